"""Where the kernels of these tests are, and which tests a missing tool leaves out."""

from pathlib import Path

import ptxemu
import pytest
from ptxemu import toolchain

KERNELS = Path(__file__).parent / "kernels"
TOOLS = {"needs_nvcc": "nvcc", "needs_ptxas": "ptxas"}  # marker -> program


def missing(tool: str) -> bool:
    try:
        toolchain.find_tool(tool)
    except ptxemu.ToolMissing:
        return True
    return False


def pytest_collection_modifyitems(items):
    for marker, tool in TOOLS.items():
        if missing(tool):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"{tool} is not installed"))


@pytest.fixture(scope="session")
def kernels():
    return KERNELS
