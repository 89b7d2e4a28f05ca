"""``laxity load``: requests to a running cluster, and what became of them."""
