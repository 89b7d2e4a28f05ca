"""The web dashboard: a page that draws live views, and what serves it."""
