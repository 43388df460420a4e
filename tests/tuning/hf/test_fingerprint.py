"""The fingerprint of a model's weights: the same for the same weights, another one for any other, and cheap."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ctkernels.testing.models import make_model, tokens
from ctkernels.tuning import digest
from ctkernels.tuning.adapters.lora import Lora
from ctkernels.tuning.hf import fingerprint
from ctkernels.tuning.hf.fingerprint import base_held, base_weights, weights_fingerprint


@pytest.fixture
def hashed(monkeypatch):
    """How often weights were read."""
    calls = []
    original = fingerprint._read
    monkeypatch.setattr(fingerprint, "_read", lambda model: calls.append(model) or original(model))
    return calls


def test_the_same_weights_in_every_type_and_place(tmp_path):
    expected = weights_fingerprint(make_model("llama", torch.float32))
    assert len(expected) == 32
    assert weights_fingerprint(make_model("llama", torch.bfloat16)) == expected
    assert weights_fingerprint(make_model("llama", torch.float64)) == expected
    model = make_model("llama", torch.float32)
    model.save_pretrained(tmp_path)
    assert weights_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)) == expected
    for place in (lambda part: cpu_offload(part), lambda part: disk_offload(part, str(tmp_path / "weights"))):
        offloaded = make_model("llama", torch.float32)
        place(offloaded.model.layers[1])
        assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
        assert weights_fingerprint(offloaded) == expected
    with torch.no_grad():
        model.lm_head.weight.set_(model.lm_head.weight.t().contiguous().t())  # other strides
    assert weights_fingerprint(model) == expected


def test_every_weight_counts():
    """One value, anywhere; also where a change leaves no trace but the value."""
    model = make_model("gpt2", torch.float32)
    found = {weights_fingerprint(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            place = parameter.view(-1)[parameter.numel() // 3]
            before = place.clone()
            place.add_(0.5)
            found.add(weights_fingerprint(model))
            place.copy_(before)
    assert len(found) == 1 + len(list(model.parameters()))
    expected = weights_fingerprint(model)
    model.transformer.h[1].mlp.c_fc.weight.data.mul_(2)  # as peft merges its updates, which leaves the version
    assert weights_fingerprint(model) != expected


def test_names_and_shapes_count():
    linear = nn.Linear(4, 4, bias=False)
    turned = nn.Linear(2, 8, bias=False)
    turned.weight.data = linear.weight.data.view(8, 2)
    named = nn.Module()
    named.other = linear.weight
    assert len({weights_fingerprint(x) for x in (linear, turned, named)}) == 3


def test_weights_are_read_once(hashed):
    model = make_model("llama", torch.float32)
    for _ in range(3):
        weights_fingerprint(model)
        base_weights(model)
    model(tokens(1, 4))
    with Lora(2, 2.0, ("q_proj",)).merged(model):
        base_weights(model)
    weights_fingerprint(model)
    assert len(hashed) == 1
    model.load_state_dict(make_model("llama", torch.float32, seed=1).state_dict())
    weights_fingerprint(model)
    assert len(hashed) == 2


def test_the_base_of_a_model_that_is_changed_for_a_while():
    model = make_model("llama", torch.float32)
    own = weights_fingerprint(model)
    with pytest.raises(RuntimeError), base_held(model):
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        with base_held(model):
            assert base_weights(model).whole == own != weights_fingerprint(model)
        assert base_weights(model).whole == own
        raise RuntimeError
    assert base_weights(model).whole == weights_fingerprint(model) != own


def test_tied_weights_are_read_once_and_count_under_both_names(monkeypatch):
    model = make_model("gpt2", torch.float32)
    assert model.lm_head.weight is model.transformer.wte.weight
    names = []
    original = digest.digests
    monkeypatch.setattr(
        fingerprint,
        "digests",
        lambda tensors, rounded: original(((names.append(name) or name, x) for name, x in tensors), rounded),
    )
    tied = weights_fingerprint(model)
    assert len(names) == len(list(model.parameters()))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert weights_fingerprint(model) == tied


def test_weights_that_cannot_be_had():
    with torch.device("meta"):
        assert weights_fingerprint(nn.Linear(2, 2)) is None


def test_weights_of_types_of_their_own():
    """Both parts of a tensor that is made of two, each by its bytes."""

    def model(a, b):
        module = nn.Module()
        module.weight = nn.Parameter(TwoTensor(torch.tensor(a), torch.tensor(b)), requires_grad=False)
        return module

    expected = weights_fingerprint(model([1.0, 2.0], [3.0, 4.0]))
    assert weights_fingerprint(model([1.0, 2.0], [3.0, 4.0])) == expected
    assert weights_fingerprint(model([1.0, 2.0], [3.0, 5.0])) != expected
    assert weights_fingerprint(model([1.5, 2.0], [3.0, 4.0])) != expected


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "configuration", [BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_4bit=True)], ids=["8", "4"]
)
def test_quantised_weights(tmp_path, hashed, configuration):
    """By what would be saved, scales included, not by where it lies."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    found = set()
    for scale in (1, 1, 2):
        model = make_model("llama", torch.float32, **sizes)
        with torch.no_grad():  # a power of two leaves the 4 or 8 bits of every weight as they are
            model.model.layers[0].mlp.up_proj.weight.mul_(scale)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=configuration, dtype=torch.float32)
        found.add(weights_fingerprint(loaded))
        before = len(hashed)
        assert weights_fingerprint(loaded) in found and len(hashed) == before
    found.add(weights_fingerprint(model))
    assert len(found) == 3 and None not in found


def test_pieces_and_threads_do_not_matter(monkeypatch):
    tensors = {"a": torch.randn(1000), "b": torch.arange(7), "c": torch.ones(3, 0), "d": torch.tensor(True)}
    expected = digest.digests(tensors.items())
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert digest.digests(tensors.items()) == expected
    finally:
        torch.set_num_threads(threads)
    assert digest.combined(expected) != digest.combined({**expected, "e": expected["a"]})
    assert len(set(expected.values())) == 4
