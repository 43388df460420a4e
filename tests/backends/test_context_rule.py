"""`csrc/mask.h` by itself: the one function that the CPU kernels (64 positions at a time) and the CUDA kernels (4 at a
time) call, compiled for the host and compared with `ContextMask.dense` bit for bit."""

import ctypes
import subprocess

import pytest
import torch
from torch import Tensor

import ctkernels as ct
from tools.gpu.cuda.plan import SOURCES, ContextRule

SOURCE = """
#include "mask.h"

template <int N>
static void fill(const ctk::ContextRule& rule, const ctk::ContextRow& row, int64_t positions, uint8_t* out) {
  for (int64_t first = 0; first < positions; first += N) {
    const uint64_t bits = ctk::visible_positions<N>(rule, row, first);
    for (int i = 0; i < 64; ++i)
      if (i < N ? first + i < positions : bits >> i & 1) out[first + i] = bits >> i & 1;
  }
}

extern "C" void visible(const ctk::ContextRule* rule, int64_t start, int64_t end, const uint8_t* keep, uint32_t id,
                        int64_t positions, int width, uint8_t* out) {
  const ctk::ContextRow row{start, end, keep, id};
  width == 4 ? fill<4>(*rule, row, positions, out) : fill<64>(*rule, row, positions, out);
}
"""
B, C, POSITIONS = 4, 215, 230
HIDDEN = torch.tensor([[0, 0], [3, 70], [64, 215], [0, 128]])
IDS = torch.tensor([0, 5, 2**32 - 1, 2**31])
KEEP = torch.rand(B, C, generator=torch.Generator().manual_seed(3)) < 0.6


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("context_rule")
    (folder / "rule.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([*command, f"-I{SOURCES}", "rule.cpp", "-o", "rule.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "rule.so"))


def visible(library: ctypes.CDLL, mask: ct.ContextMask, width: int) -> Tensor:
    """bool [B, POSITIONS] as the header has it, `width` positions at a time. Bits past `width` would show up in it."""
    rule = ContextRule(C, int(mask.drop_p * 2**32), mask.seed)
    out = torch.zeros(B, POSITIONS + 64, dtype=torch.uint8)
    # any byte but 0 means kept
    keep = None if mask.keep is None else (mask.keep.to(torch.uint8) * (1 + torch.arange(C) % 255)).to(torch.uint8)
    for b in range(B):
        start, end = (0, 0) if mask.hidden is None else mask.hidden[b].tolist()
        pattern = None if keep is None else ctypes.c_void_p(keep[b].data_ptr())
        library.visible(
            ctypes.byref(rule), ctypes.c_int64(start), ctypes.c_int64(end), pattern,
            ctypes.c_uint32(b if mask.row_ids is None else int(mask.row_ids[b])), ctypes.c_int64(POSITIONS), width,
            ctypes.c_void_p(out[b].data_ptr()),
        )  # fmt: skip
    assert not out[:, POSITIONS:].any()
    return out[:, :POSITIONS].bool()


@pytest.mark.parametrize("width", [4, 64])
@pytest.mark.parametrize(
    "mask",
    [
        dict(),
        dict(hidden=HIDDEN),
        dict(drop_p=0.37, seed=2**63 + 987654321, row_ids=IDS),
        dict(keep=KEEP),
        dict(hidden=HIDDEN, keep=KEEP, drop_p=0.1, seed=4),
    ],
    ids=lambda mask: "+".join(mask) or "nothing",
)
def test_the_header_is_the_context_rule(library, mask, width):
    mask = ct.ContextMask(**mask, length=C)
    assert torch.equal(visible(library, mask, width), mask.dense(B, POSITIONS))
