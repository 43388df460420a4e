"""An attached model against the stock model on the concatenated context, for every supported class, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from ctkernels import ContextMask
from ctkernels.testing.models import (
    MODELS,
    full_precision_softmax,
    make_model,
    pad_rows,
    stock_logits,
    stock_masked_logits,
    tokens,
)
from ctkernels.tuning.adapters.prefix import KVPrefix

# the old name, which every transformers 5 knows
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

CONTEXT = tokens(19, seed=2)
SEGMENTS = torch.tensor([1, 6, 11, 19])
ROWS = [tokens(size, seed=3 + size) for size in (4, 9, 1)]  # 9 is longer than the windows


@pytest.fixture(autouse=True, scope="module")
def exact():
    with full_precision_softmax():
        yield


@pytest.fixture(params=MODELS, scope="module")
def model(request, exact):
    return make_model(request.param)


@pytest.fixture(scope="module")
def prefix(model) -> KVPrefix:
    return KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)


@pytest.fixture(scope="module")
def expected(model) -> list[Tensor]:
    return [stock_logits(model, CONTEXT, row) for row in ROWS]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_prefix_matters(model, expected):
    """Guards the other tests: without the context, or with one token of it changed, the logits are far away."""
    with torch.no_grad():
        alone = model(ROWS[1][None]).logits[0]
    changed = CONTEXT.clone()
    changed[-1] = 2 + (changed[-1] - 1) % 50
    assert (alone - expected[1]).abs().max() > 1e-2
    assert (stock_logits(model, changed, ROWS[1]) - expected[1]).abs().max() > 1e-3


def test_prefix_holds_every_position(model, prefix):
    """Windowed layers, too, keep all P positions; their window is applied when rows read them."""
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    assert prefix.length == prefix.first_position == len(CONTEXT)
    assert {(key.shape[0], key.shape[1]) for key in prefix.keys} == {(heads, len(CONTEXT))}
    assert all(parameter.dtype == torch.float64 and parameter.is_leaf for parameter in prefix.parameters())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("positions", ["computed", "given"])
@torch.no_grad()
def test_padded_rows(model, prefix, expected, side, positions):
    ids, mask = pad_rows(ROWS, side)
    given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions == "given" else {}
    with prefix.attach(model):
        logits = model(ids, attention_mask=mask, **given).logits
    for row in range(len(ROWS)):
        close(logits[row][mask[row].bool()], expected[row])


@torch.no_grad()
def test_rows_of_one_length(model, prefix):
    rows = torch.stack((ROWS[1], ROWS[1].flip(0)))
    with prefix.attach(model):
        logits = model(rows).logits
    close(logits, torch.stack([stock_logits(model, CONTEXT, row) for row in rows]))


@pytest.mark.parametrize("positions", ["computed", "given"])
@torch.no_grad()
def test_packed_rows(model, prefix, expected, positions):
    lengths = [len(row) for row in ROWS]
    given = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]} if positions == "given" else {}
    keep = torch.tensor([1, 3, 7, 13])
    with prefix.attach(model) as attachment:
        attachment.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        packed = torch.cat(ROWS)[None]
        logits = model(packed, use_cache=False, **given).logits[0]
        kept = model(packed, use_cache=False, logits_to_keep=keep, **given).logits[0]
    close(logits, torch.cat(expected))
    close(kept, torch.cat(expected)[keep])


@torch.no_grad()
def test_input_embeddings(model, prefix, expected):
    with prefix.attach(model):
        logits = model(inputs_embeds=model.get_input_embeddings()(ROWS[1])[None]).logits[0]
    close(logits, expected[1])


@torch.no_grad()
def test_continued_in_steps(model, prefix, expected):
    """A row fed in pieces of 4, 1 and 4 tokens through a cache that holds own tokens alone."""
    row, cache, logits = ROWS[1][None], None, []
    with prefix.attach(model):
        for piece in row.split((4, 1, 4), dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0])
    assert cache.get_seq_length() == row.shape[1]
    close(torch.cat(logits), expected[1])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_left_padded_rows_continued_in_steps(model, prefix, expected, kind):
    """Positions come from the mask; with a static cache, a mask over the whole cache says nothing about the future."""
    ids, mask = pad_rows(ROWS, "left")
    cache = StaticCache(config=model.config, max_cache_len=12) if kind == "static" else None
    ahead = torch.cat((mask, torch.ones_like(mask)), dim=1)[:, :12]
    logits, seen = [], 0
    with prefix.attach(model):
        for piece in ids.split((6, 1, 2), dim=1):
            seen += piece.shape[1]
            given = ahead if kind == "static" else mask[:, :seen]
            out = model(piece, attention_mask=given, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    for row, wanted in enumerate(expected):
        close(torch.cat(logits, dim=1)[row][mask[row].bool()], wanted)


def generate(model, ids: Tensor, mask: Tensor | None = None, **settings) -> list[list[int]]:
    settings = {"max_new_tokens": 10, "do_sample": False, **settings}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def continuations(model) -> list[list[int]]:
    """Greedy continuation of each row behind the concatenated context, by the stock model, one row at a time."""
    return [generate(model, torch.cat((CONTEXT, row))[None])[0] for row in ROWS]


def test_generation(model, prefix, continuations):
    with prefix.attach(model):
        assert [generate(model, row[None])[0] for row in ROWS] == continuations
        assert generate(model, ROWS[1][None], use_cache=False)[0] == continuations[1]


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
def test_generation_of_a_left_padded_batch(model, prefix, continuations, settings):
    ids, mask = pad_rows(ROWS, "left")
    with prefix.attach(model):
        assert generate(model, ids, mask, **settings) == continuations


def test_beam_search(model, prefix):
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    expected = generate(model, torch.cat((CONTEXT, ROWS[0]))[None], **settings)
    with prefix.attach(model):
        assert generate(model, ROWS[0][None], **settings) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_masked_gradients(name, layout):
    """Leave-one-out with token dropout: logits and prefix gradients against autograd through a stock cache with the
    expanded prefix and the mask as a 4D mask."""
    model = make_model(name)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    rows = tokens(3, 7, seed=8)
    mask = ContextMask.leave_one_out(prefix.segments, torch.tensor([2, -1, 0]), drop_p=0.3, seed=11)
    weights = torch.randn(3, 7, model.config.vocab_size, dtype=torch.float64)
    visible = mask.dense(3, prefix.length)
    logits = stock_masked_logits(model, list(prefix.keys), list(prefix.values), visible, rows)
    expected = torch.autograd.grad((logits * weights).sum(), list(prefix.parameters()))
    with prefix.attach(model) as attachment:
        attachment.mask = mask
        if layout == "padded":
            own = model(rows).logits
        else:
            attachment.cu_seqlens = torch.arange(0, 22, 7, dtype=torch.int32)
            own = model(rows.reshape(1, -1)).logits.reshape(logits.shape)
        gradients = torch.autograd.grad((own * weights).sum(), list(prefix.parameters()))
    close(own, logits)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert wanted.abs().max() > 1e-3
        close(gradient, wanted)


def prefix_gradients(model, prefix: KVPrefix, **attach) -> list[Tensor]:
    """Gradients of the loss of all rows, packed."""
    prefix.zero_grad()
    lengths = torch.tensor([0] + [len(row) for row in ROWS])
    with prefix.attach(model, cu_seqlens=lengths.cumsum(0).int(), **attach):
        logits = model(torch.cat(ROWS)[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], torch.cat(ROWS)[1:]).backward()
    return [parameter.grad for parameter in prefix.parameters()]


def without_dropout(model) -> None:
    """Train mode is what switches checkpointing on; dropout would make two passes differ."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model, prefix, reentrant):
    mask = ContextMask(hidden=torch.tensor([[1, 6], [6, 11], [0, 0]]), drop_p=0.2, seed=4)
    expected = prefix_gradients(model, prefix, mask=mask)
    without_dropout(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    try:
        gradients = prefix_gradients(model, prefix, mask=mask)
    finally:
        model.eval()
        model.gradient_checkpointing_disable()
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert wanted.abs().max() > 1e-6
        close(gradient, wanted)


@torch.no_grad()
def test_half_precision(model):
    """A bf16 model with its fp32 prefix stays as close to the fp64 result as bf16 rounding allows."""
    name = next(name for name, entry in MODELS.items() if entry[1] == type(model).__name__)
    half = make_model(name, torch.bfloat16)
    prefix = KVPrefix.from_tokens(half, CONTEXT, SEGMENTS)
    assert all(parameter.dtype == torch.float32 for parameter in prefix.parameters())
    exact = stock_logits(make_model(name, torch.bfloat16).double(), CONTEXT, ROWS[1])
    stock = (stock_logits(half, CONTEXT, ROWS[1]).double() - exact).abs().max()
    with prefix.attach(half):
        own = (half(ROWS[1][None]).logits[0].double() - exact).abs().max()
    assert own <= 2 * stock
