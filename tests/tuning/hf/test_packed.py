"""Rows that transformers packs into one sequence, on an attached model: none sees another one."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

from ctkernels import ContextMask
from ctkernels.testing.models import MODELS, full_precision_softmax, make_model, stock_logits, tokens
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.adapters.prefix_set import PrefixSet

CONTEXT = tokens(11, seed=2)
SEGMENTS = torch.tensor([0, 5, 11])
ROWS = [tokens(size, seed=size) for size in (4, 1, 7)]
OFFSETS = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
COLLATORS = {
    "position_ids": {},
    "cu_seq_lens": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "seq_idx": {"return_seq_idx": True, "return_position_ids": False},
    "everything": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}


@pytest.fixture(autouse=True, scope="module")
def exact():
    with full_precision_softmax():
        yield


def attachable(name: str = "llama"):
    model = make_model(name)
    return model, KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)


def flattened(kind: str) -> dict:
    batch = DataCollatorWithFlattening(**COLLATORS[kind])([{"input_ids": row.tolist()} for row in ROWS])
    batch.pop("labels")
    return batch


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_flattened_batches(name):
    """Whatever the collator says of the rows, with and without attachment.cu_seqlens."""
    model, prefix = attachable(name)
    expected = torch.cat([stock_logits(model, CONTEXT, row) for row in ROWS])
    for kind in COLLATORS:
        batch = flattened(kind)
        if name == "bloom":  # takes no position ids
            batch.pop("position_ids", None)
        for told in (OFFSETS, None):
            if told is None and len(batch) == 1:
                continue  # nothing is left that tells of rows
            with prefix.attach(model, cu_seqlens=told):
                torch.testing.assert_close(model(**batch).logits[0], expected, rtol=1e-9, atol=1e-9)


def test_rows_have_their_own_masks_and_prefixes():
    """A mask and prefix_index have an entry for each packed row; and the gradient."""
    model, prefix = attachable()
    other = KVPrefix.from_tokens(model, CONTEXT.flip(0), SEGMENTS)
    mask = ContextMask.leave_one_out(prefix.segments, torch.tensor([0, -1, 1]))
    results = []
    for batch, offsets in ((flattened("cu_seq_lens"), None), ({"input_ids": torch.cat(ROWS)[None]}, OFFSETS)):
        prefix.zero_grad()
        with prefix.attach(model, mask=mask, cu_seqlens=offsets):
            model(**batch).logits.square().sum().backward()
        with torch.no_grad(), PrefixSet([prefix, other]).attach(model, [0, 1, 1]) as attachment:
            attachment.cu_seqlens = offsets
            results.append([model(**batch).logits, *(p.grad.clone() for p in prefix.parameters())])
    for actual, wanted in zip(*results, strict=True):
        assert torch.equal(actual, wanted)


@torch.no_grad()
def test_what_does_not_fit():
    model, prefix = attachable()
    ids = torch.cat(ROWS)[None]
    padded = {"attention_mask": torch.ones_like(ids)}
    numbers = torch.tensor([[0] * 4 + [1] + [2] * 7])
    with prefix.attach(model) as attachment:
        for given, error, message in (
            ({"cu_seq_lens_q": [0, 4, 5, 12]}, TypeError, r"cu_seq_lens_q must be an int32 tensor \[B\+1\]"),
            ({"seq_idx": OFFSETS}, TypeError, r"seq_idx must be an int32 tensor \[1, N\]"),
            (
                {"cu_seq_lens_q": OFFSETS[:-1]},
                ValueError,
                r"cu_seq_lens_q must rise from 0 .* tokens 12, got \[0, 4, 5\]",
            ),
            ({"cu_seq_lens_k": OFFSETS.flip(0)}, ValueError, "cu_seq_lens_k must rise from 0"),
            (
                {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS[[0, 1, 3]]},
                ValueError,
                r"cu_seq_lens_k must tell of the same rows as cu_seq_lens_q, \[0, 4, 5, 12\], got \[0, 4, 12\]",
            ),
            ({"cu_seq_lens_q": OFFSETS, "seq_idx": numbers * 0}, ValueError, "seq_idx must tell of the same rows"),
            ({"seq_idx": numbers[:, 1:]}, ValueError, r"for each of 12 tokens, got \[1, 11\]"),
            ({"cu_seq_lens_q": OFFSETS, **padded}, ValueError, "attention_mask must be None"),
            ({"cu_seq_lens_q": OFFSETS, "past_key_values": DynamicCache()}, ValueError, "past_key_values must be None"),
            ({"position_ids": numbers}, ValueError, "position_ids are not consecutive"),
            (
                {"attention_mask": numbers + 1},
                ValueError,
                "attention_mask must be 0 or 1.* instead of a mask that numbers",
            ),
        ):
            with pytest.raises(error, match=message):
                model(ids, **given)
        with pytest.raises(ValueError, match=r"with cu_seq_lens_q, .* one packed sequence .* got a batch of 2"):
            model(ids.expand(2, -1), cu_seq_lens_q=OFFSETS)
        with pytest.raises(ValueError, match="position_ids are not consecutive"):
            model(ids.expand(2, -1), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8]] * 2))
        attachment.cu_seqlens = torch.tensor([0, 12], dtype=torch.int32)
        with pytest.raises(ValueError, match=r"cu_seq_lens_q must tell of the same rows as attachment\.cu_seqlens"):
            model(ids, cu_seq_lens_q=OFFSETS)


def test_compiled():
    """Offsets need no look at values; position ids that start over are noticed when the compiled code runs."""
    model = make_model("llama", torch.float32)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    ids = torch.cat(ROWS)[None]
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    restarts = torch.cat([torch.arange(len(row)) for row in ROWS])[None]
    with torch.no_grad(), prefix.attach(model):
        expected = model(ids, cu_seq_lens_q=OFFSETS, use_cache=False).logits
        torch.testing.assert_close(forward(ids, cu_seq_lens_q=OFFSETS, use_cache=False).logits, expected)
        with pytest.raises(RuntimeError, match=r"under torch\.compile, packed rows need"):
            forward(ids, position_ids=restarts, use_cache=False)
    torch._dynamo.reset()
