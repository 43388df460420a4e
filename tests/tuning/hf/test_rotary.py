"""Keys moved to other positions, against keys that were computed there."""

from __future__ import annotations

import pytest
import torch

from ctkernels.testing.models import make_model, tokens
from ctkernels.tuning.adapters.compose import moved
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.hf import rotary
from ctkernels.tuning.hf.encode import encode_tokens
from ctkernels.tuning.hf.exact import full_precision
from ctkernels.tuning.hf.models import find_decoder
from tests.tuning.hf.tiny_classes import tiny

# model type -> layers that turn no keys
CLASSES = {
    "llama": [],
    "cohere": [],  # neighbours are turned, not halves
    "glm": [],  # half of the dimensions, neighbours
    "phi": [],  # half of the dimensions
    "gemma3_text": [],  # angles of each layer type
    "cohere2": [2],  # no positions in full attention
    "smollm3": [2],
    "olmoe": [],
    "gptj": [],  # a table of sines and cosines, in fp32
    "codegen": [],
    "falcon": [],
    "gpt_neox_japanese": [],
}


@pytest.mark.parametrize("model_type", CLASSES)
def test_moved_keys(model_type):
    with full_precision():
        model = tiny(model_type)
        decoder, context, where = find_decoder(model), tokens(9), torch.arange(9)
        here, there = (encode_tokens(model, context, position=at)[0] for at in (0, 11))
        still, close = [], {"rtol": 1e-9, "atol": 1e-6 if model_type in ("gptj", "codegen") else 1e-9}
        for layer, (key, wanted) in enumerate(zip(here, there, strict=True)):
            bare = rotary.unrotated(decoder, layer, key, where)
            torch.testing.assert_close(rotary.rotated(decoder, layer, bare, where + 11), wanted, **close)
            torch.testing.assert_close(rotary.rotated(decoder, layer, bare, where), key, **close)
            still += [layer] if bare is key else []
    assert still == CLASSES[model_type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    model = tiny("smollm3").to(dtype)
    prefix = KVPrefix.from_tokens(model, tokens(9), torch.tensor([0, 9]))
    assert torch.equal(moved(prefix, model, 14).keys[2], prefix.keys[2])
    assert not torch.equal(moved(prefix, model, 14).keys[1], prefix.keys[1])


def test_rotations_that_are_not_known(monkeypatch):
    """Another way of turning keys is noticed, not computed wrongly."""
    monkeypatch.setattr(rotary, "_candidates", lambda attention: [lambda x, c, s: x * c])
    model = make_model("llama")
    prefix = KVPrefix.from_tokens(model, tokens(9), torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="moves keys to other positions, but how LlamaForCausalLM rotates them is not"):
        moved(prefix, model, 14)
    assert moved(prefix, model, 9) is prefix


def test_queries_that_depend_on_positions():
    model = tiny("ministral3")
    prefix = KVPrefix.from_tokens(model, tokens(9), torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="Ministral3ForCausalLM scales queries by their position"):
        moved(prefix, model, 14)
