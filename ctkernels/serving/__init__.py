"""Stored prefixes in serving engines."""
