"""The library that makes system calls fail. Nothing large is imported here: the program starts again with it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LOADED = "CTKERNELS_FAULTS"  # the library of faults.c
WRITES, READS = 0, 1  # calls that `Faults.arm` counts


class Faults:
    """`faults.c`, which must have been loaded before the C library: see `loaded_first`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def arm(self, kind: int, after: int, error: int) -> None:
        """From now on, the call number `after` of this kind fails with `error`; 0 kills the process."""
        self._library.torture_fail(kind, after, error)

    def disarm(self) -> int:
        """Nothing fails any more; returns how many calls of the armed kind there were."""
        return int(self._library.torture_disarm())


def loaded_first() -> Faults:
    """Builds `faults.c`; starts this program again with it, unless it is loaded."""
    if LOADED not in os.environ:
        handle, library = tempfile.mkstemp(suffix=".so")
        os.close(handle)
        source = Path(__file__).parent / "faults.c"
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, str(source), "-ldl"], check=True)
        os.environ.update({"LD_PRELOAD": library, LOADED: library})
        os.execv(sys.executable, [sys.executable, "-m", "tools.torture", *sys.argv[1:]])
    found = ctypes.CDLL(os.environ.pop(LOADED))
    Path(os.environ.pop("LD_PRELOAD")).unlink()
    return Faults(found)
