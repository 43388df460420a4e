"""Serving tuned prefixes: the servers that read them."""
