"""Where tables go: a terminal has a width, a file or a pipe has none and cuts nothing."""

from __future__ import annotations

from rich.console import Console

WIDE = 1000  # columns; a table takes what its texts need


def console(stderr: bool = False) -> Console:
    """The console of standard output, or of standard error."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=WIDE)
