"""How many blocks a multiprocessor holds, against the vendors' occupancy tables."""

import pytest

from tools.gpu.architectures import ARCHITECTURES


@pytest.mark.parametrize(
    "name, registers, shared, warps, blocks",
    [
        ("sm_80", 255, 32 * 1024, 4, 2),  # 256 registers x 128 threads = half of the file
        ("sm_80", 128, 32 * 1024, 4, 4),
        ("sm_80", 128, 48 * 1024, 4, 3),  # 164 KiB / (48 + 1)
        ("sm_80", 32, 0, 8, 8),  # 2048 threads
        ("sm_86", 32, 0, 8, 6),  # 1536 threads
        ("sm_90", 168, 200 * 1024, 8, 1),
        ("sm_120", 64, 99 * 1024, 4, 1),
        ("gfx942", 256, 16 * 1024, 4, 2),  # 512 registers per lane of a vector unit, four of them
        ("gfx942", 512, 16 * 1024, 4, 1),
        ("gfx942", 64, 33 * 1024, 4, 1),
    ],
)
def test_blocks_of_a_multiprocessor(name, registers, shared, warps, blocks):
    assert ARCHITECTURES[name].blocks(registers, shared, warps) == blocks


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_block_with_too_much_shared_memory_does_not_fit(architecture):
    assert architecture.blocks(32, architecture.shared_limit, 4) == 1
    assert architecture.blocks(32, architecture.shared_limit + 1, 4) == 0


def test_capabilities():
    assert ARCHITECTURES["sm_80"].capability == (8, 0)
    assert ARCHITECTURES["sm_120"].capability == (12, 0)
    assert ARCHITECTURES["gfx942"].capability == (9, 4)
