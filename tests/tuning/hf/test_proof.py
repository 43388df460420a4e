"""The proof of a model class: what it finds out, what it keeps, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, PhimoeConfig, PhimoeForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from ctkernels.testing.models import GROUPED, make_model, tokens
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.hf import models, proof, served
from ctkernels.tuning.hf.discover import find_layout
from ctkernels.tuning.hf.exact import full_precision
from ctkernels.tuning.hf.kinds import Reach
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.hf.tiny import kind_of, make_tiny, shrink, unknown_lengths

CONFIG = LlamaConfig(**GROUPED)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, without what this process knows."""
    monkeypatch.setenv("CTKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(served, "_verdicts", {})
    return tmp_path / "proofs"


def verdict_of(model_class, config=CONFIG) -> served.Verdict:
    return proof.prove(model_class, config, find_layout(model_class(config)))


def test_rotary_angles_as_older_transformers_compute_them():
    """An fp64 table times positions that were integers and became fp32, as in transformers 5.17."""
    table, positions = torch.rand(3, 1, dtype=torch.float64), torch.arange(4)[None].float()
    with full_precision():
        assert torch.equal(table @ positions, table @ positions.double())
    with pytest.raises(RuntimeError, match=r"Double but found Float|same dtype"):
        table @ positions


# classes of a user, with one mistake each


class Alike(LlamaForCausalLM):
    """Nothing is wrong with this one."""


class Farsighted(LlamaAttention):
    """Hides what is near, by a mask of its own: an attached model never sees that mask."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.is_floating_point():
            S, T = attention_mask.shape[-2:]
            near = (torch.arange(T - S, T)[:, None] - torch.arange(T)).abs()
            attention_mask = attention_mask.masked_fill((near > 0) & (near < 3), -1e9)
        return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)


class Forgetful(LlamaAttention):
    """Attends by itself, and so never reads the prefix."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            f(hidden_states).view(heads).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class Declining(LlamaAttention):
    """From position 40 on its values count half."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        out, weights = super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        cached = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        seen = max(cached, hidden_states.shape[1])
        return (out / 2 if seen > self.config.decline_after else out), weights


class WithDecline(LlamaConfig):
    decline_after: int | None = None


def llama_with(attention, name) -> type[LlamaForCausalLM]:
    """A class of models whose layers have another attention."""

    def init(self, config):
        LlamaForCausalLM.__init__(self, config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = attention(config, index).to(self.dtype)

    return type(name, (LlamaForCausalLM,), {"__init__": init, "__module__": __name__})


def test_classes_of_a_user():
    assert verdict_of(Alike).reason is None
    for attention, why in (
        (Farsighted, "rows behind contexts of several lengths: results differ by"),
        (Forgetful, "failed: ValueError: the attention of layers [0, 1, 2] of Wrong did not read the attached prefix"),
    ):
        assert why in verdict_of(llama_with(attention, "Wrong")).reason
    model = llama_with(Farsighted, "Wrong")(CONFIG)
    with pytest.raises(TypeError, match="model class Wrong is not supported: rows behind contexts of several lengths"):
        KVPrefix.from_tokens(model, tokens(9), torch.tensor([0, 9]))


def test_right_and_wrong_are_far_apart():
    right = verdict_of(Alike)
    assert right.difference < 1e-12 and right.effect > 0.1 and set(right.differences) == set(proof.CHECKS)
    assert max(verdict_of(llama_with(Farsighted, "Wrong")).differences.values()) > 1e-2


def test_a_window_that_only_the_mask_knows(monkeypatch):
    """The same class with and without one are two kinds."""
    sizes = {**GROUPED, "num_local_experts": 4, "intermediate_size": 16}
    without, within = (PhimoeConfig(**sizes, sliding_window=window) for window in (None, 6))
    assert kind_of(without) != kind_of(within)
    assert all(verdict_of(PhimoeForCausalLM, config).reason is None for config in (without, within))
    monkeypatch.setattr(models, "reach_of", lambda base, attention: Reach())
    assert verdict_of(PhimoeForCausalLM, without).reason is None
    assert "results differ by" in verdict_of(PhimoeForCausalLM, within).reason


@pytest.mark.parametrize("length, why", [(40, "results differ by"), (5000, "config.decline_after, 5000, is not known")])
def test_lengths_that_are_not_known(length, why):
    """A field that may be a length is gone beyond, or the class is refused."""
    config = dataclasses.dataclass(WithDecline)(**GROUPED, decline_after=length)
    assert unknown_lengths(config) == {"decline_after": length} and unknown_lengths(CONFIG) == {}
    assert why in verdict_of(llama_with(Declining, "WithLength"), config).reason


class Alternating(LlamaAttention):
    """Its layers differ by a rule that the configuration says nothing of."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.reach = "far" if layer_idx % 5 == 4 else "near"


def test_layers_that_no_tiny_model_has():
    model_class = llama_with(Alternating, "Uneven")
    assert verdict_of(model_class).reason is None  # three layers
    config = LlamaConfig(**{**GROUPED, "num_hidden_layers": 6})
    assert "some of its layers have attention.reach 'far', which no tiny" in verdict_of(model_class, config).reason


def test_a_layer_that_somebody_replaced():
    model = make_model("llama")
    find_decoder(model)
    model.model.layers[1].self_attn = Farsighted(model.config, 1)
    with pytest.raises(TypeError, match=r"has layers of .*\.LlamaAttention, this model of .*Farsighted"):
        find_decoder(model)


def test_it_takes_seconds():
    started = time.perf_counter()
    assert verdict_of(Alike).reason is None
    assert time.perf_counter() - started < 10


def test_nothing_of_the_process_changes():
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        verdict = verdict_of(Alike)
        assert torch.empty(1).device.type == "meta" and torch.is_inference_mode_enabled()
    assert verdict.reason is None and verdict.difference < 1e-12
    assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == threads


# what is kept


@pytest.fixture
def proofs(monkeypatch):
    """Which classes are proved."""
    seen = []

    def prover(model_class, config, layout):
        seen.append(model_class.__name__)
        return proof.prove(model_class, config, layout)

    monkeypatch.setattr(served, "_provers", [prover])
    return seen


def forget(monkeypatch) -> None:
    """As a new process."""
    monkeypatch.setattr(served, "_verdicts", {})


def test_a_proof_is_made_once(proofs, cache, monkeypatch):
    for _ in range(2):
        for _ in range(2):
            find_decoder(Alike(CONFIG))
        forget(monkeypatch)
    assert proofs == ["Alike"] and len(list(cache.iterdir())) == 1
    kept = json.loads(next(cache.iterdir()).read_text())
    assert kept["class"].endswith("test_proof.Alike") and kept["reason"] is None
    find_decoder(Alike(LlamaConfig(**{**GROUPED, "hidden_size": 64, "num_hidden_layers": 5, "rms_norm_eps": 0.1})))
    assert len(proofs) == 1  # sizes are of no importance
    find_decoder(Alike(LlamaConfig(**{**GROUPED, "attention_bias": True})))
    assert len(proofs) == 2  # switches are


@pytest.mark.parametrize("change", ["transformers", "sources", "own source", "damaged", "no folder"])
def test_a_proof_is_made_again(proofs, cache, monkeypatch, change):
    """For another release or other code, and where the verdict was lost."""
    find_decoder(Alike(CONFIG))
    forget(monkeypatch)
    if change == "transformers":
        monkeypatch.setattr(served.transformers, "__version__", "99")
    elif change == "sources":
        monkeypatch.setattr(served, "_sources", lambda: "others")
    elif change == "own source":
        monkeypatch.setattr(served, "_own_source", lambda model_class: "another")
    elif change == "damaged":
        next(cache.iterdir()).write_text("{")
    else:
        monkeypatch.setenv("CTKERNELS_CACHE", "/dev/null/no")
    find_decoder(Alike(CONFIG))
    assert proofs == ["Alike", "Alike"]


def test_a_refusal_is_kept(proofs, monkeypatch):
    wrong = llama_with(Forgetful, "Wrong")(CONFIG)
    for _ in range(2):
        with pytest.raises(TypeError, match="model class Wrong is not supported"):
            find_decoder(wrong)
        forget(monkeypatch)
    assert proofs == ["Wrong"]


def test_the_shipped_table_needs_no_proof(proofs, monkeypatch):
    for name in ("llama", "gpt2", "bloom", "gemma3"):
        find_decoder(make_model(name))
    assert not proofs
    monkeypatch.setattr(served.transformers, "__version__", "99")
    served.table.cache_clear()
    try:
        find_decoder(make_model("llama"))
    finally:
        served.table.cache_clear()
    assert proofs == ["LlamaForCausalLM"]


def test_a_model_that_changes_is_looked_at_again():
    model = make_model("gpt2")
    assert len(find_decoder(model).layers) == 3
    del model.transformer.h[2]
    assert len(find_decoder(model).layers) == 2


# tiny models


def test_kinds():
    big = {"hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128, "num_key_value_heads": 8}
    kind = kind_of(LlamaConfig(**big))
    for same in (
        {"num_hidden_layers": 80, "vocab_size": 128256, "intermediate_size": 14336, "eos_token_id": [1, 2]},
        {"hidden_size": 2048, "num_attention_heads": 32, "head_dim": 64},
        {"rms_norm_eps": 0.1, "tie_word_embeddings": True, "dtype": "bfloat16", "use_cache": False},
        {"a_field_of_nobody": 7, "quantization_config": {"bits": 4}},
    ):
        assert kind_of(LlamaConfig(**{**big, **same})) == kind
    for other in (
        {"attention_bias": True},
        {"num_key_value_heads": 32},
        {"num_key_value_heads": 1},
        {"head_dim": 64},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ):
        assert kind_of(LlamaConfig(**{**big, **other})) != kind
    assert LlamaConfig(**big).hidden_size == 4096


def test_every_kind_of_layer_is_kept():
    from transformers import Gemma3TextConfig, SmolLM3Config

    tiny = shrink(Gemma3TextConfig(num_hidden_layers=48))
    assert tiny.num_hidden_layers == 3 and set(tiny.layer_types) == {"sliding_attention", "full_attention"}
    assert tiny.sliding_window == 8
    tiny = shrink(SmolLM3Config(num_hidden_layers=36))
    assert sorted(set(tiny.no_rope_layers)) == [0, 1] and tiny.layer_types == ["full_attention"] * 3


def test_tiny_models_are_random_and_whole():
    model = make_tiny(LlamaForCausalLM, shrink(CONFIG))
    assert {p.dtype for p in model.parameters()} == {torch.float64} and not model.training
    assert all(p.std() > 0.01 and not p.requires_grad for p in model.parameters())
    again = make_tiny(LlamaForCausalLM, shrink(CONFIG))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert unknown_lengths(GPT2Config()) == {}


def test_full_precision():
    x = torch.linspace(0, 1, 5, dtype=torch.float64)
    exact = torch.softmax(x, 0)
    assert nn.functional.softmax(x, dim=0, dtype=torch.float32).dtype == torch.float32
    with full_precision():
        assert torch.equal(nn.functional.softmax(x, dim=0, dtype=torch.float32), exact)
        assert x.float() is x and x.to(torch.float32).dtype == torch.float64
        assert x.to("cpu", torch.float32).dtype == x.to(dtype=torch.float32).dtype == torch.float64
        assert x.half().float().dtype == torch.float32  # what is not fp64 is as ever
    assert x.float().dtype == torch.float32
