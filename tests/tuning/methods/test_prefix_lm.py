"""A start whose tokens see each other in both directions: exact where it can be, refused elsewhere."""

import pytest
import torch
from transformers import AttentionInterface

from ctkernels.testing.models import MODELS, make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning.data.formats import encode_context
from ctkernels.tuning.hf import both_ways
from ctkernels.tuning.hf.both_ways import encode_both_ways
from ctkernels.tuning.hf.encode import encode_tokens
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.tune import tune
from tests.tuning.runs import TOKENIZER, run

IDS = torch.randint(4, 60, (17,), generator=torch.Generator().manual_seed(0))
EXACT = [name for name in MODELS if name != "bloom"]


def whole(name):
    """A tiny model with windows, where it has some, that are wider than the context."""
    settings = MODELS[name][2]
    return make_model(name, **({"sliding_window": 64} if settings.get("sliding_window") else {}))


def without_a_mask(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """Attention written out, which looks at no mask at all."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("without_a_mask", without_a_mask)


@pytest.mark.parametrize("name", EXACT)
def test_every_token_reads_every_other_one(name):
    """Against attention that is written out and has no mask to forget."""
    model = whole(name)
    keys, values, _ = encode_both_ways(model, IDS)
    model.set_attn_implementation("without_a_mask")
    cache = model(IDS[None], use_cache=True, position_ids=torch.arange(len(IDS))[None]).past_key_values
    for layer, own_keys, own_values in zip(cache.layers, keys, values, strict=True):
        torch.testing.assert_close(own_keys, layer.keys[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_values, layer.values[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_later_tokens_count_and_the_model_is_left_as_it_was(name, implementation):
    model = whole(name)
    model.set_attn_implementation(implementation)
    model.train()
    keys, *_ = encode_both_ways(model, IDS)
    assert model.training
    model.eval()
    causal, _ = encode_tokens(model, IDS)
    torch.testing.assert_close(keys[0], causal[0], rtol=0, atol=1e-9)  # the first layer has read nothing yet
    assert (keys[1] - causal[1]).abs().amax(dim=(0, 2))[0] > 1e-4
    changed = torch.cat((IDS[:-1], IDS[-1:] + 1))
    assert not torch.allclose(encode_both_ways(model, changed)[0][1][:, 0], keys[1][:, 0])
    one, *_ = encode_both_ways(model, IDS[:1])
    torch.testing.assert_close(one[1], causal[1][:, :1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["ct-kv", "ttt+ct-kv"])
def test_it_is_trained_and_begins_at_what_was_encoded(method):
    model = make_model("llama", torch.float32)
    small = {"start": "prefix-lm", "drop_p": 0.0}
    result = run(method, model, options=small)
    assert result.history[-1].loss < result.history[-3].loss
    if method == "ct-kv":
        untrained = run(method, model, options={**small, "epochs": 0}).prefix
        context = encode_context(TOKENIZER, DEMONSTRATIONS)
        keys, values, _ = encode_both_ways(model, context.input_ids)
        assert all(torch.equal(a, b) for a, b in zip(untrained.parameters(), (*keys, *values), strict=True))
        assert untrained.segments.tolist() == context.segments.tolist()
        assert result.history[0].loss != run(method, model, options={"drop_p": 0.0}).history[0].loss


def test_what_cannot_be_exact_is_refused_before_anything_is_trained():
    with pytest.raises(
        ValueError, match="start='prefix-lm' is not defined for BloomForCausalLM: ALiBi biases attention"
    ):
        run("ct-kv", make_model("bloom"), options={"start": "prefix-lm"})
    for name in ("mistral", "gemma3"):
        with pytest.raises(ValueError, match=r"has layers with a window of 6, and the context has \d+ tokens"):
            run("ct-kv", make_model(name), options={"start": "prefix-lm"})
    model = make_model("llama", torch.float32)
    model.set_attn_implementation("without_a_mask")
    with pytest.raises(
        ValueError, match="needs attn_implementation 'sdpa' or 'eager', which take any mask, got 'without_a"
    ):
        run("ttt+ct-kv", model, options={"start": "prefix-lm"}, on_epoch=lambda *a: pytest.fail("ttt was trained"))
    model.set_attn_implementation("sdpa")
    other = run("ct-kv", model, options={"epochs": 0}).adapter
    with pytest.raises(ValueError, match="start='prefix-lm' encodes a context of its own alone, so that start_from"):
        run("ct-kv", model, options={"start": "prefix-lm"}, start_from=other)


def test_a_model_that_ignores_the_mask_is_found(monkeypatch):
    """An implementation that is causal whatever it is given, under a name that is taken to obey."""

    def causal(module, query, key, value, attention_mask, **kwargs):
        groups = query.shape[1] // key.shape[1]
        pair = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        out = torch.nn.functional.scaled_dot_product_attention(query, *pair, is_causal=query.shape[2] > 1)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("always_causal", causal)
    monkeypatch.setattr(both_ways, "WITH_A_MASK", ("always_causal",))
    model = make_model("llama")
    model.set_attn_implementation("always_causal")
    with pytest.raises(ValueError, match="with attn_implementation='always_causal' hides later tokens whatever mask"):
        encode_both_ways(model, IDS)


def test_a_start_without_bos():
    plain = char_tokenizer(adds_bos=False)
    model = make_model("llama", torch.float32)
    settings = get_method("ct-kv").settings(start="prefix-lm", epochs=0, front_tokens=2)
    result = tune(model, plain, DEMONSTRATIONS[:2], "ct-kv", settings)
    assert result.prefix.segments[0] == 2 and result.prefix.length == 2 + len(
        encode_context(plain, DEMONSTRATIONS[:2]).input_ids
    )
