"""Several prefixes as one, and prefixes at other positions, against the stock model on contexts put there."""

import pytest
import torch
from transformers import DynamicCache

from ctkernels.testing.models import MODELS, full_precision_norm, full_precision_softmax, make_model, tokens
from ctkernels.tuning import KVPrefix, concatenate, moved

CONTEXTS = [tokens(n, seed=n) for n in (5, 8, 4)]
SEGMENTS = [torch.tensor([1, 3, 5]), torch.tensor([8]), torch.tensor([1, 4])]
ROW = tokens(9, seed=3)
LEARNED = ("gpt2", "opt")


@pytest.fixture(autouse=True, scope="module")
def exact():
    with full_precision_softmax(), full_precision_norm():
        yield


def parts(model) -> list[KVPrefix]:
    return [KVPrefix.from_tokens(model, c, s) for c, s in zip(CONTEXTS, SEGMENTS, strict=True)]


@torch.no_grad()
def stock(model, starts: list[int], row_start: int) -> torch.Tensor:
    """Logits of ROW behind contexts that the stock model encoded each on its own, at the positions given."""
    numbered = model.config.model_type != "bloom"
    caches = []
    for context, start in zip(CONTEXTS, starts, strict=True):
        positions = {"position_ids": start + torch.arange(len(context))[None]} if numbered else {}
        caches.append(DynamicCache())
        model(context[None], past_key_values=caches[-1], use_cache=True, **positions)
    joined = DynamicCache()
    for layer in range(len(caches[0].layers)):
        for cache in caches:
            joined.update(cache.layers[layer].keys, cache.layers[layer].values, layer)
    positions = {"position_ids": row_start + torch.arange(len(ROW))[None]} if numbered else {}
    mask = torch.ones(1, joined.get_seq_length() + len(ROW), dtype=torch.int64)
    return model(ROW[None], past_key_values=joined, attention_mask=mask, **positions).logits


@torch.no_grad()
def attached(model, prefix: KVPrefix) -> torch.Tensor:
    with prefix.attach(model):
        return model(ROW[None]).logits


@pytest.mark.parametrize("name", MODELS)
def test_concatenated(name):
    """ "consecutive" moves keys to within the fp32 of the rotation's angles, "shared" leaves them alone."""
    model = make_model(name)
    prefixes = parts(model)
    if name in LEARNED:
        with pytest.raises(ValueError, match="keys cannot be moved; use positions='shared'"):
            concatenate(prefixes, model)
    else:
        one = concatenate(prefixes, model)
        assert one.first_position == one.length == 17
        assert one.context == tuple(token for part in prefixes for token in part.context)
        tolerance = 1e-9 if name == "bloom" else 1e-4
        torch.testing.assert_close(attached(model, one), stock(model, [0, 5, 13], 17), rtol=tolerance, atol=tolerance)
    if name == "bloom":
        with pytest.raises(ValueError, match="its prefixes cannot share positions"):
            concatenate(prefixes, model, "shared")
    else:
        side_by_side = concatenate(prefixes, model, "shared")
        assert side_by_side.first_position == 8 and side_by_side.length == 17
        torch.testing.assert_close(attached(model, side_by_side), stock(model, [0, 0, 0], 8), rtol=1e-9, atol=1e-9)


def test_demonstrations_of_the_parts():
    """Offsets move with their part; BOS of a later part counts to its first demonstration; trained tokens to none."""
    model = make_model("llama")
    first, trained, last = parts(model)
    assert concatenate([first, trained, last], model).segments.tolist() == [1, 3, 5, 17]
    assert concatenate([trained, last], model).segments.tolist() == [9, 12]
    assert concatenate([trained, trained], model).segments.tolist() == [16]
    joined = concatenate([first, last], model)
    assert joined.metadata.method == "concatenated" and joined.metadata.config_hash == first.metadata.config_hash
    assert joined.metadata.settings["parts"] == [{"method": "icl", "length": 5}, {"method": "icl", "length": 4}]
    assert all(p.is_leaf and p.requires_grad for p in joined.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_moved(name):
    """There the same is computed, by keys that differ; and back again."""
    model = make_model(name)
    prefix = parts(model)[0]
    far = moved(prefix, model, 40)
    torch.testing.assert_close(attached(model, far), attached(model, prefix), rtol=1e-4, atol=1e-4)
    assert far.first_position == 40 and (far.keys[1] - prefix.keys[1]).abs().max() > 0.1
    assert torch.equal(far.segments, prefix.segments)
    assert far.values[0].data_ptr() != prefix.values[0].data_ptr()  # training one leaves the other alone
    back = moved(far, model, 5)
    for key, wanted in zip(back.keys, prefix.keys, strict=True):
        torch.testing.assert_close(key, wanted, rtol=1e-5, atol=1e-5)


def test_refusals():
    model = make_model("llama")
    prefixes = parts(model)
    with pytest.raises(ValueError, match="at least one KVPrefix"):
        concatenate([], model)
    with pytest.raises(ValueError, match="positions must be 'consecutive' or 'shared', got 'any'"):
        concatenate(prefixes, model, "any")
    with pytest.raises(ValueError, match="has intermediate_size 40 instead of 48"):
        concatenate([*prefixes, parts(make_model("llama", intermediate_size=48))[0]], model)
    with pytest.raises(ValueError, match="136 tokens, more than the model's context of 128"):
        concatenate([prefixes[1]] * 17, model)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for changed, message in (
        (make_model("llama", rope_parameters=dynamic), "rotates keys differently in longer sequences"),
        (make_model("gpt2"), "adds learned positions"),
        (make_model("bloom"), "rows begin right behind those of the prefix"),
    ):
        with pytest.raises(ValueError, match=message):
            moved(parts(changed)[0], changed, 20)
