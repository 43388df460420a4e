"""Tuned prefixes in serving engines, a subpackage or module for each engine."""
