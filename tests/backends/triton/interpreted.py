"""What only the Triton kernels have, tested under the interpreter; `test_interpreter.py` runs this file."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

import ctkernels as ct
from ctkernels.backends.triton import backend as triton_backend
from ctkernels.backends.triton import config, tables, tile
from ctkernels.backends.triton.config import Target
from ctkernels.backends.triton.interpreter import repair
from ctkernels.backends.triton.plan import plan_forward
from ctkernels.problem import Problem
from ctkernels.testing import oracle
from ctkernels.testing.backends import Backend
from ctkernels.testing.calls import cotangents_for, make_call, run
from ctkernels.testing.compare import assert_matches

repair()
TRITON = Backend("triton")


def words_of(mask: dict, lens: list[int], P: int, C: int) -> tuple[torch.Tensor, ...]:
    """What the launches of a forward pass find: words of rows [words, B] and of tiles [2, words, tiles]; the tiles."""
    B, H, D = len(lens), 2, 16
    q, k, v = (torch.zeros(B, H, max(lens), D) for _ in range(3))
    prefix = torch.zeros(1, H, P, D)
    defaults = dict(hidden=None, row_ids=None, keep=None, drop_p=0.0, seed=0, seed_in_memory=None) | mask
    problem = Problem(
        alibi_slopes=None, cu_seqlens=None, seq_lens=torch.tensor(lens), prefix_index=None, prefix_lens=None,
        context_length=C, scale=1.0, causal=True, window=0, window_prefix=True, softcap=0.0,
        **defaults,
    )  # fmt: skip
    launches = {launch.name: launch for launch in plan_forward(q, k, v, prefix, prefix, None, problem).launches}
    for name in ("words_kernel", "tile_words_kernel"):
        launches[name].run()
    args = launches["tile_words_kernel"].args
    return args["WORDS"], args["TILE_WORDS"].unflatten(0, (2, -1)), args["TILES"]


def bits(words: torch.Tensor, n: int) -> torch.Tensor:
    """int32 [words, ...] -> bool [n, ...], key by key."""
    spread = (words[:, None] >> torch.arange(32).view(1, -1, *[1] * (words.dim() - 1))) & 1
    return spread.flatten(0, 1)[:n].bool()


KEEP = torch.rand(5, 215, generator=torch.Generator().manual_seed(3)) < 0.6
HIDDEN = torch.tensor([[0, 0], [3, 70], [60, 215], [200, 210], [0, 100]])
IDS = torch.tensor([0, 5, 2**32 - 1, 2**31, 7])


@pytest.mark.parametrize(
    "mask",
    [
        dict(hidden=HIDDEN),
        dict(hidden=HIDDEN, drop_p=0.37, seed=2**63 + 987654321, row_ids=IDS),
        dict(keep=KEEP, drop_p=0.1, seed=4),
    ],
)
@pytest.mark.parametrize("C", [215, 230])
def test_words_are_the_context_rule(mask, C):
    """Spans, patterns, dropout, the end of the context and of the prefix, bit for bit; and what the rows of a tile see
    together, to which a row without queries adds nothing."""
    P, lens = 230, [30, 1, 0, 9, 20]
    if "keep" in mask and C > 215:
        mask = mask | dict(keep=torch.cat([KEEP, KEEP[:, :15]], 1))
    rows, tiles, table = words_of(mask, lens, P, C)
    expected = torch.zeros(5, 256, dtype=torch.bool)
    expected[:, :C] = oracle.context_visible(5, C, **mask)
    expected[:, C:P] = True
    assert torch.equal(bits(rows, 256).T, expected)
    shown = 0
    for i in range(table.shape[1]):
        first, count = table[tables.TILE_ROW, i], table[tables.TILE_ROWS, i]
        members = [r for r in range(first, first + count) if lens[r]]
        if members:
            shown += 1
            assert torch.equal(bits(tiles[0], 256)[:, i], expected[members].any(0))
            assert torch.equal(bits(tiles[1], 256)[:, i], expected[members].all(0))
    assert shown


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


@pytest.mark.parametrize(
    ("multiprocessors", "P", "H", "G", "lens", "ranges"),
    [
        (1, 200, 4, 2, [9, 0, 20, 1, 25], (1, 1, 1)),
        (1000, 200, 4, 2, [9, 0, 20, 1, 25], (3, 3, 1)),
        (1000, 40, 8, 1, [20, 0, 1, 26, 18], (1, 1, 2)),
    ],
    ids=["none", "keys", "queries"],
)
def test_any_number_of_splits(monkeypatch, multiprocessors, P, H, G, lens, ranges):
    """Key ranges in forward and dq, query ranges in the prefix gradients: none, and as many as there can be."""
    counted, original = [], config.split_count

    def split_count(*args):
        counted.append(original(*args))
        return counted[-1]

    monkeypatch.setattr(config, "split_count", split_count)
    monkeypatch.setattr(triton_backend, "target", lambda device: Target("sm_80", multiprocessors))
    hidden = torch.tensor([[b * P // 5, (b + 1) * P // 5] for b in range(len(lens))])
    call = make_call(
        lens=lens, P=P, H=H, Hk=1, D=16, Dv=24, G=G, types="fp32", bias=(G, H, P) if G > 1 else (H, P),
        prefix_index=torch.arange(len(lens)) % G if G > 1 else None, mask=dict(hidden=hidden, drop_p=0.1, seed=1),
    )  # fmt: skip
    cotangents = cotangents_for(call)
    assert_matches(call, run(call, TRITON, cotangents), cotangents)
    assert tuple(counted) == ranges


@pytest.mark.parametrize(
    ("arch", "D", "Dv"),
    [
        ("sm_80", 96, 96),
        ("sm_90", 256, 256),
        ("sm_86", 64, 64),
        ("gfx942", 128, 128),
        ("sm_90", 512, 512),
        ("sm_80", 192, 128),
    ],
)
def test_every_table_of_tiles(monkeypatch, arch, D, Dv):
    monkeypatch.setattr(triton_backend, "target", lambda device: Target(arch, 8))
    call = make_call(lens=[20, 35, 9], P=100, H=4, Hk=1, D=D, Dv=Dv, types="bf16+fp32", mask=dict(drop_p=0.2, seed=1))
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


def test_rows_of_very_different_lengths():
    """One long row beside many of a single token, and empty ones between."""
    lens = [1] * 20 + [90] + [0] * 10 + [1] * 3
    mask = dict(hidden=torch.tensor([[b, b + 9] for b in range(len(lens))]), drop_p=0.2, seed=3)
    call = make_call(lens=lens, P=70, H=1, Hk=1, D=16, types="fp32", mask=mask)
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
            for D in (1, 64, 80, 128, 129, 256, 257, 512):
                for name, sizes in config.config_for(Target(arch, 1), D, dtype)._asdict().items():
                    for one in (sizes, config.lighter(sizes, name, D)):
                        assert one.block_n in (16, 32, 64), "two words of 32 keys"
