"""The share of tensor-core instructions: the path of a full tile by hand, the rules, the committed table, and the tuned
kernels compiled again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tools.gpu.cuda import build as cuda_build
from tools.gpu.cuda import report as cuda_report
from tools.gpu.cuda import sass as cuda_sass
from tools.gpu.cuda.sass import Share

RESULTS = Path(cuda_sass.__file__).parents[1] / "results"
# A loop from 0x10 to 0x90: masked tiles take 0x30 and 0x40, full ones jump over them; both meet for the product at
# 0x60. Behind the end lies a block that is rarely taken, and comes back to 0x80.
LISTING = """
0000 MOV R1, c[0x0][0x28]
0010 LDSM.16.M88.4 R4, [R2]
0020 @P0 BRA 0x50
0030 FSEL R3, R3, -INF, P1
0040 FSEL R4, R4, -INF, P1
0050 FMUL R3, R3, R5
0060 HMMA.16816.F32.BF16 R8, R4, R6, R8
0070 @!P2 BRA 0xd0
0080 IADD3 R2, R2, 0x10, RZ
0090 @P3 BRA 0x10
00a0 STG.E [R2.64], R8
00b0 EXIT
00c0 BRA 0xc0
00d0 FMUL R8, R8, R9
00e0 FMUL R9, R9, R9
00f0 BRA 0x80
"""
FULL = [0x10, 0x20, 0x50, 0x60, 0x70, 0x80, 0x90]


def parse(listing: str) -> list[cuda_sass.Instruction]:
    instructions = []
    for line in listing.strip().splitlines():
        address, text = line.split(" ", 1)
        opcode = text.split(" ", 1)[1].split()[0] if text.startswith("@") else text.split()[0]
        instructions.append((int(address, 16), opcode, text))
    return instructions


def path(listing: str) -> list[int]:
    instructions = parse(listing)
    return [instructions[n][0] for n in cuda_sass.path_of_a_full_tile(instructions)]


def test_the_shortest_way_with_all_products():
    assert path(LISTING) == FULL


def test_a_way_around_the_products_is_none():
    """Full tiles do all products: a jump over them, as for tiles that are skipped, is no shorter path."""
    assert path(LISTING.replace("0050 FMUL R3, R3, R5", "0050 @P5 BRA 0x80")) == FULL


def test_products_that_only_masked_tiles_have_do_not_lie_on_the_way():
    """Two versions of the product, one with and one without a mask: the one without is what counts."""
    listing = LISTING.replace("0030 FSEL R3, R3, -INF, P1", "0030 HMMA.16816.F32.BF16 R8, R4, R6, R8")
    listing = listing.replace("0040 FSEL R4, R4, -INF, P1", "0040 BRA 0x70")
    assert path(listing) == FULL


def test_an_inner_loop_without_products_is_passed_once():
    listing = LISTING.replace("0050 FMUL R3, R3, R5", "0050 @P6 BRA 0x50")
    assert path(listing) == FULL


def test_without_tensor_cores_there_is_no_way():
    assert path(LISTING.replace("HMMA.16816.F32.BF16", "FFMA")) == []
    assert path("0000 EXIT\n0010 BRA 0x10") == []


@pytest.fixture(scope="module")
def table():
    return json.loads((RESULTS / "cuda_sass.json").read_text())


@pytest.mark.needs_nvcc
def test_tuned_kernels_are_not_worse_than_committed_nor_than_flash_attention(table):
    shares, _ = cuda_sass.measure()
    assert [(share.kernel, share.D) for share in shares] == [(k, D) for D in (64, 128) for k in KERNELS]
    if cuda_build.nvcc_version() == table["nvcc"]:  # another compiler makes other code
        committed = cuda_sass.read(table["entries"])
        broken = [line for share in shares for line in cuda_sass.regressions(share, committed)]
        broken += [line for share in shares for line in cuda_sass.violations(share)]
        assert not broken, "\n".join(broken)


KERNELS = ("forward", "query", "keys")
OURS = Share("forward", 64, 128, 600, 240, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(), None),
        (dict(instructions=616), "0.208 tensor-core instructions, not 0.208"),  # 128 of 616 and of 614
        (dict(spills=4), "4 bytes of spills"),
    ],
)
def test_rules(change, message):
    broken = cuda_sass.violations(replace(OURS, **change))
    assert broken == [] if message is None else message in broken[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(), None),
        (dict(instructions=601, registers=255), None),
        (dict(instructions=620), "the share was 0.213, is 0.206"),
        (dict(spills=4), "spills were 0, are 4"),
        (dict(kernel="query"), "not in the committed table"),
    ],
)
def test_regressions(change, message):
    broken = cuda_sass.regressions(replace(OURS, **change), {("forward", 64): OURS})
    assert broken == [] if message is None else message in broken[0]


def test_the_report_and_what_is_read_back(monkeypatch, tmp_path):
    shares = [replace(OURS, kernel=kernel, D=D) for D in (64, 128) for kernel in KERNELS]
    monkeypatch.setattr(cuda_sass, "measure", lambda: (shares, {}))
    monkeypatch.setattr(cuda_build, "nvcc_version", lambda: "13.0")
    page = tmp_path / "cuda.md"
    page.write_text("before\n<!-- cuda_sass -->\nold\n<!-- /cuda_sass -->\nafter\n")
    assert cuda_report.main(["--out", str(tmp_path), "--docs", str(page), "--parts", "sass"]) == 0
    record = json.loads((tmp_path / "cuda_sass.json").read_text())
    assert list(cuda_sass.read(record["entries"]).values()) == shares
    text = (tmp_path / "cuda_sass.md").read_text()
    assert text.index("| FlashAttention-2 forward | 64 | 128 | 614 | 0.208 |") < text.index(
        "| forward | 64 | 128 | 600 |"
    )
    assert "old" not in page.read_text() and "| keys | 128 | 128 | 600 | 0.213 | 240 | 0 |" in page.read_text()
