"""Serving engines, started as a user starts them: `make serve-check`, `make bench-engines`."""
