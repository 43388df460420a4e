"""Models some of whose layers keep a state in place of keys and values."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ctkernels import ContextMask
from ctkernels.testing.classes import COMPLETE, PUBLISHED
from ctkernels.testing.models import make_model, pad_rows, tokens
from ctkernels.tuning.adapters.compose import concatenate, moved
from ctkernels.tuning.adapters.peft_export import flat_cache
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.adapters.prefix_set import PrefixSet
from ctkernels.tuning.hf import proof, states
from ctkernels.tuning.hf.discover import find_layout
from ctkernels.tuning.hf.encode import encode, encode_tokens
from ctkernels.tuning.hf.exact import full_precision
from ctkernels.tuning.hf.models import find_decoder
from tests.tuning.hf import tiny_classes
from tests.tuning.hf.tiny_classes import CONTEXT, SEGMENTS, check_checkpointing, class_of

# gated delta nets, convolutions alone, state spaces, state spaces beside the attention of every layer
CLASSES = ["qwen3_next", "lfm2", "bamba", "falcon_h1"]
ROWS = [tokens(3), tokens(7, seed=4), tokens(1, seed=5)]
# the old name, which every transformers 5 knows
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def settings_of(model_type: str):
    return PUBLISHED.get((model_type, "LFM2"), COMPLETE.get(model_type, {}))


def tiny(model_type: str):
    return tiny_classes.tiny(model_type, **settings_of(model_type))


@pytest.fixture(scope="module", params=CLASSES)
def model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def prefix(model) -> KVPrefix:
    with full_precision():
        return KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)


@torch.no_grad()
def stock(model, row, context=CONTEXT):
    return model(torch.cat((context, row))[None]).logits[0, len(context) :]


@pytest.mark.parametrize("name", [*CLASSES, "zaya", "granitemoehybrid", "olmo_hybrid", "lfm3"])
def test_proof(name):
    model_class, config = class_of(name, **settings_of(name))
    verdict = proof.prove(model_class, config, find_layout(tiny(name)))
    assert verdict.reason is None and verdict.difference < 1e-12 and verdict.effect > 0.1


@pytest.mark.parametrize("name", ["nemotron_h", "zamba2", "jamba"])
def test_classes_that_do_not_agree_with_themselves(name):
    """A step of one token bounds the time step otherwise than a longer one (nemotron_h, zamba2), and longer ones begin
    with no state (jamba)."""
    model_class, config = class_of(name, **settings_of(name))
    verdict = proof.prove(model_class, config, find_layout(tiny(name)))
    assert verdict.reason.endswith("the stock model itself gives other results with its cache than without")


def test_states_are_needed(model, prefix):
    """What attention reads is not all that a context leaves."""
    zeros = {name: torch.zeros_like(x) for name, x in prefix.states.items()}
    with full_precision(), torch.no_grad():
        expected = stock(model, ROWS[1])
        with KVPrefix(prefix.keys, prefix.values, SEGMENTS, 12, prefix.metadata, zeros).attach(model):
            assert (model(ROWS[1][None]).logits[0] - expected).abs().max() > 1e-2
    for some in ({}, dict(list(prefix.states.items())[1:2])):
        part = KVPrefix(prefix.keys, prefix.values, SEGMENTS, 12, prefix.metadata, some)
        with pytest.raises(ValueError, match="prefix holds no state for layers"):
            part.attach(model)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_saved_prefix(model, prefix, cache, tmp_path):
    """Written, read and attached, with rows padded on the left: the tokens that follow the whole context."""
    prefix.save_pretrained(tmp_path)
    read = KVPrefix.from_pretrained(tmp_path, model)
    assert all(torch.equal(read.states[name], x) for name, x in prefix.states.items()) and len(read.states) > 0
    ids, mask = pad_rows(ROWS, "left")
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with full_precision():
        with read.attach(model):
            actual = model.generate(ids, attention_mask=mask, cache_implementation=cache, **settings)[:, ids.shape[1] :]
        for row, own in zip(ROWS, actual, strict=True):
            whole = torch.cat((CONTEXT, row))[None]
            expected = model.generate(whole, attention_mask=torch.ones_like(whole), **settings)
            assert torch.equal(own, expected[0, whole.shape[1] :])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients(model, prefix, side, use_cache):
    """Of keys, values and states: rows of a batch get what each row gets by itself, packed rows too."""
    rows = ROWS[:2] if use_cache else ROWS  # in a cache the state behind a single token is made in place
    ids, mask = pad_rows(rows, side)
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0).int()

    def gradients(loss):
        prefix.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in prefix.parameters()]

    with full_precision(), prefix.attach(model) as attachment:
        alone = gradients(sum(model(row[None], use_cache=False).logits.square().sum() for row in rows))
        logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
        together = gradients((logits.square() * mask[..., None]).sum())
        attachment.cu_seqlens = offsets
        packed = gradients(model(torch.cat(rows)[None], use_cache=False).logits.square().sum())
    assert all(grad.abs().max() > 0 for grad in alone)
    for actual in (together, packed):
        torch.testing.assert_close(actual, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_gradient_checkpointing(name, reentrant):
    def run(model, prefix):
        with prefix.attach(model):
            model(tokens(2, 6)).logits.square().mean().backward()

    check_checkpointing(partial(tiny, name), reentrant, run)


@torch.no_grad()
def test_rows_of_several_prefixes(model, prefix):
    other = tokens(5, seed=9)
    with full_precision():
        expected = [stock(model, ROWS[1], context) for context in (other, CONTEXT)]
        several = PrefixSet([prefix, KVPrefix.from_tokens(model, other, torch.tensor([0, 5]))])
        with several.attach(model, [1, 0]):
            actual = model(ROWS[1].expand(2, -1)).logits
    torch.testing.assert_close(list(actual), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_context_behind_a_prefix(model, prefix):
    """States go on from those of the prefix, and an empty context leaves them."""
    whole, none = KVPrefix.from_tokens(model, torch.cat((CONTEXT, ROWS[1])), SEGMENTS), CONTEXT[:0]
    with full_precision():
        behind = encode(model, ROWS[1], behind=prefix)
    for name, x in behind.states.items():
        torch.testing.assert_close(x, whole.states[name].data, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(x, prefix.states[name]) for name, x in encode(model, none, behind=prefix).states.items())
    assert all(not x.any() for x in encode(model, none).states.values())


def test_refusals(model, prefix):
    for mask in (ContextMask(hidden=torch.tensor([[0, 5]])), ContextMask(keep=torch.ones(1, 12, dtype=torch.bool))):
        with (
            prefix.attach(model, mask=mask),
            pytest.raises(ValueError, match="hides prefix positions from attention alone"),
        ):
            model(ROWS[0][None])
    with torch.no_grad(), prefix.attach(model, mask=ContextMask(drop_p=0.5)):
        model(ROWS[0][None])
    with pytest.raises(ValueError, match="those of several contexts are not that of all of them"):
        concatenate([prefix, prefix], model)
    with pytest.raises(ValueError, match="keeps keys and values alone"):
        flat_cache(prefix)
    with pytest.raises(ValueError, match="belongs to one context as a whole"):
        encode_tokens(model, CONTEXT)
    with pytest.raises(TypeError, match=r"states\['conv_0_0'\] must be a tensor of type torch.float64, got"):
        states_as_float = {name: x.detach().float() for name, x in prefix.states.items()}
        KVPrefix(prefix.keys, prefix.values, SEGMENTS, 12, prefix.metadata, states_as_float)
    attention_alone = {"conv_0_0": prefix.states["conv_0_0"]}
    with pytest.raises(ValueError, match="has no layers that keep one"):
        states.check_states(attention_alone, find_decoder(make_model("llama")))


def test_copies_keep_their_states(model, prefix):
    for copy in (concatenate([prefix], model), moved(prefix, model, 20)):
        assert copy is not prefix
        assert all(torch.equal(copy.states[name], x) for name, x in prefix.states.items())
