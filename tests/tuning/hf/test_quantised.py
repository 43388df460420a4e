"""Base models whose weights are quantised by real packages, on the CPU: the prefix trains, the weights do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ctkernels.testing.models import make_model, tokens
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.hf.forward import frozen
from tests.tuning.runs import TOKENIZER, run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

# name -> (configuration, class of the weights, how far gradients may be from those of the dequantised model: the 8-bit
# layers of bitsandbytes round activations, too, which makes 0.10 here; 4-bit ones compute with dequantised weights)
QUANTISED = {
    "bitsandbytes 8 bit": (BitsAndBytesConfig(load_in_8bit=True), "Int8Params", 0.2),
    "bitsandbytes 4 bit": (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        "Params4bit",
        1e-3,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised")
    model = make_model("llama", torch.float32, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    model.save_pretrained(path)
    return path


def gradients(model: PreTrainedModel, prefix: KVPrefix) -> list[Tensor]:
    prefix.zero_grad()
    with prefix.attach(model):
        model(tokens(3, 7), use_cache=False).logits.square().mean().backward()
    return [p.grad.clone() for p in prefix.parameters()]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad(), frozen(model):
        return model(tokens(3, 7)).logits


@pytest.mark.parametrize("name", QUANTISED)
def test_a_prefix_of_a_quantised_model(folder, name):
    """Would catch: layers whose inference kernels have no derivative, weights that are unpacked or moved, a LoRA
    update that stays in them."""
    configuration, kind, tolerance = QUANTISED[name]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=configuration, dtype=torch.float32)
    weight = model.model.layers[1].self_attn.q_proj.weight
    assert type(weight).__name__ == kind
    prefix = KVPrefix.from_demonstrations(model, TOKENIZER, DEMONSTRATIONS)
    actual = gradients(model, prefix)
    result = run("ct-kv", model, options={"drop_p": 0.3})
    assert all(p.dtype == torch.float32 for p in result.prefix.parameters())
    assert result.history[-1].loss < result.history[0].loss
    assert model.model.layers[1].self_attn.q_proj.weight is weight and type(weight).__name__ == kind
    assert not any(module.training for module in model.modules())
    before = logits(model)
    adapter = run("ttt", model, options={"lr": 0.1}).adapter
    with adapter.weights(model):
        assert (logits(model) - before).abs().max() > 1e-2
    assert torch.equal(logits(model), before)
    expected = gradients(model.dequantize(), prefix)
    assert type(model.model.layers[1].self_attn.q_proj.weight).__name__ == "Parameter"
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() and b.norm() > 0
