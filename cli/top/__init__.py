"""``laxity top``: a cluster as it is now, in a terminal."""
