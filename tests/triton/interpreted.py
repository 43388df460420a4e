"""What only the Triton kernels have, tested under the interpreter; `test_interpreter.py` runs this file."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

import ctkernels as ct
from ctkernels import triton_backend
from ctkernels.triton_kernels import Target, config, tile
from tests.op import oracle
from tests.op.backends import Backend
from tests.op.cases import cotangents_for, make_call, run
from tests.op.compare import assert_matches
from tests.op.interpreter import repair

repair()
TRITON = Backend("triton")


@triton.jit
def words_kernel(
    OUT, IDS, START, END, PRESENT, k0, prefix_len, length, drop_below, seed_low, seed_high,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, ROWS)
    keep = OUT + r
    present = tl.load(PRESENT + r) != 0
    words = tile.context_words(
        tl.load(IDS + r), tl.load(START + r), tl.load(END + r), keep, present, k0, prefix_len, length, drop_below,
        seed_low, seed_high, True, False, BLOCK_N,
    )  # fmt: skip
    tl.store(OUT + r, words)


@pytest.mark.parametrize("block_n", [16, 32, 64])
@pytest.mark.parametrize("k0", [0, 64, 192])
def test_words_are_the_context_rule(k0, block_n):
    """Spans, dropout, the end of the context and of the prefix, and absent rows, bit for bit."""
    P, C, seed, drop_p = 230, 215, 2**63 + 987654321, 0.37
    ids = torch.tensor([0, 5, 2**32 - 1, 2**31])
    hidden = torch.tensor([[0, 0], [3, 70], [60, 215], [200, 210]])
    mask = dict(hidden=hidden, drop_p=drop_p, seed=seed, row_ids=ids)
    expected = torch.zeros(4, 320, dtype=torch.bool)
    expected[:, :C] = oracle.context_visible(4, C, **mask)
    expected[:, C:P] = True
    expected[3] = False  # absent
    out = torch.zeros(4, dtype=torch.int64)
    bits = [w - 2**32 if w >= 2**31 else w for w in (int(drop_p * 2**32), seed & 0xFFFFFFFF, seed >> 32)]
    present = torch.tensor([1, 1, 1, 0], dtype=torch.int32)
    table = [x.int().contiguous() for x in (ids, *hidden.unbind(1))]
    words_kernel[(1,)](out, *table, present, k0, P, C, *bits, ROWS=4, BLOCK_N=block_n)
    got = ((out[:, None] >> torch.arange(block_n)) & 1).bool()
    assert torch.equal(got, expected[:, k0 : k0 + block_n])


@triton.jit
def tanh_kernel(X, Y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tile.tanh(tl.load(X + at)))


def test_tanh_is_within_three_units():
    x = torch.cat([torch.linspace(-20, 20, 65536), torch.logspace(-30, 0, 65536)])
    y = torch.empty_like(x)
    tanh_kernel[(x.numel() // 1024,)](x, y, BLOCK=1024)
    truth = torch.tanh(x.double())
    assert ((y.double() - truth).abs() <= 3 * 2**-24 * truth.abs()).all()


@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_any_number_of_splits(monkeypatch, multiprocessors):
    """Key ranges in forward and dq, query ranges in the prefix gradients: none, and as many as there can be."""
    monkeypatch.setattr(triton_backend, "target", lambda device: Target("sm_80", multiprocessors))
    hidden = torch.tensor([[b % 7 * 40, b % 7 * 40 + 40] for b in range(8)])
    sizes = dict(lens=[9, 3, 0, 20, 11, 30, 1, 25], P=290, H=8, Hk=1, D=16, G=2, types="fp32")
    mask = dict(hidden=hidden, drop_p=0.1, seed=1)
    index = torch.arange(8) % 2
    call = make_call(**sizes, bias=(2, 8, 290), prefix_index=index, mask=mask)
    cotangents = cotangents_for(call)
    assert_matches(call, run(call, TRITON, cotangents), cotangents)


@pytest.mark.parametrize(("arch", "D"), [("sm_80", 96), ("sm_90", 256), ("sm_86", 64), ("gfx942", 128)])
def test_every_table_of_tiles(monkeypatch, arch, D):
    monkeypatch.setattr(triton_backend, "target", lambda device: Target(arch, 8))
    call = make_call(lens=[20, 35, 9], P=100, H=4, Hk=1, D=D, types="bf16+fp32", mask=dict(drop_p=0.2, seed=1))
    cotangents = cotangents_for(call)
    assert_matches(call, run(call, TRITON, cotangents), cotangents)


def test_gradients_that_are_not_asked_for():
    """In a model's first layer q, k, v need none; each of the others can be asked for alone, to the same bits."""
    call = make_call(types="fp32", bias=(4, 11), mask=dict(drop_p=0.2, seed=1))
    cotangents = cotangents_for(call)
    full = run(call, TRITON, cotangents)
    for name in call.tensors:
        leaves = {n: x.detach().requires_grad_(n == name) for n, x in call.tensors.items()}
        t = leaves
        outputs = ct.prefix_attention(
            t["q"], t["k"], t["v"], t["prefix_k"], t["prefix_v"], ct.ContextMask(**call.mask),
            prefix_bias=t["prefix_bias"], return_lse=True, backend="triton",
        )  # fmt: skip
        (grad,) = torch.autograd.grad(outputs, leaves[name], cotangents)
        assert torch.equal(grad, full["d" + name]), name


def test_rows_of_very_different_lengths_are_cut_into_tiles():
    """One long row beside many of a single token: more rows in a tile than the kernels take, so that it is cut."""
    lens = [1] * 40 + [90] + [0] * 10 + [1] * 7
    mask = dict(hidden=torch.tensor([[b % 60, b % 60 + 9] for b in range(len(lens))]), drop_p=0.2, seed=3)
    call = make_call(lens=lens, P=70, H=2, Hk=2, D=16, types="fp32", mask=mask)
    cotangents = cotangents_for(call)
    assert_matches(call, run(call, TRITON, cotangents), cotangents)
    plain = replace(call, mask=None)
    assert_matches(plain, run(plain, TRITON, cotangents), cotangents)


def test_fp64_is_refused():
    with pytest.raises(ValueError, match=r"backend='triton'.*fp32.*fp64"):
        run(make_call(types="fp64"), TRITON)


def test_config_covers_every_type_and_width():
    for arch in ("sm_80", "sm_86", "sm_90", "sm_120", "gfx942"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for D in (1, 64, 80, 128, 129, 256):
                for sizes in config.config_for(Target(arch, 1), D, dtype):
                    assert sizes.block_n in (16, 32, 64), "a row's word has 64 bits"
