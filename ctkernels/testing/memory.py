"""Peak memory of this process between two points in time."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> bool:
    """Start measuring anew; False where the system cannot, and the peak is that of the whole process so far."""
    try:
        CLEAR.write_text("5")  # Linux: resets VmHWM to the present resident size
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Highest resident size since `reset_peak`, in bytes."""
    if STATUS.exists():
        (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
