"""Attaching and detaching: what is switched over and back, what is refused."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers

from ctkernels import ContextMask
from ctkernels.testing.models import (
    MODELS,
    PAD,
    SIZES,
    make_model,
    pad_rows,
    stock_logits,
    tokens,
)
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.hf import attention as hf_attention
from ctkernels.tuning.hf.models import find_decoder

# the old name, which every transformers 5 knows
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

CONTEXT = tokens(12, seed=2)
SEGMENTS = torch.tensor([0, 5, 12])
ROW = tokens(1, 7, seed=3)


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def prefix(llama) -> KVPrefix:
    return KVPrefix.from_tokens(llama, CONTEXT, SEGMENTS)


def snapshot(model) -> dict:
    """Everything about a model that attaching could leave behind."""
    return {
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        },
        "implementation": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "config objects": {id(vars(module).get("config")) for module in model.modules()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "state": list(model.state_dict()),
        "training": [module.training for module in model.modules()],
    }


@pytest.mark.parametrize("name", MODELS)
def test_leaves_no_trace(name):
    """The model is as before, after success and after an exception, and its weights are not touched meanwhile."""
    model = make_model(name)
    next(model.parameters()).requires_grad_(True)
    before = snapshot(model)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    assert snapshot(model) == before
    with prefix.attach(model):
        model(ROW)
        inside = snapshot(model)
        assert inside["implementation"].startswith("ctkernels")
        assert inside["requires_grad"] == before["requires_grad"]
        assert inside["state"] == before["state"]
    assert snapshot(model) == before
    with pytest.raises(KeyError), prefix.attach(model):
        raise KeyError
    assert snapshot(model) == before


def test_encoding_ignores_and_restores_train_mode(llama, prefix):
    model = make_model("gpt2", embd_pdrop=0.5)
    expected = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    model.train()
    model.lm_head.eval()
    model.gradient_checkpointing_enable()
    before = snapshot(model)
    actual = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    assert snapshot(model) == before
    for a, b in zip(actual.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_encoding_gives_trainable_leaves_of_their_own(llama):
    with torch.inference_mode():
        prefix = KVPrefix.from_tokens(llama, CONTEXT, SEGMENTS)
    assert all(p.requires_grad and p.is_leaf and not p.is_inference() for p in prefix.parameters())
    storages = {p.untyped_storage().data_ptr() for p in prefix.parameters()}
    assert len(storages) == 2 * len(prefix.keys)


@torch.no_grad()
def test_changes_to_the_config_survive(llama, prefix):
    model = make_model("llama")
    with KVPrefix.from_tokens(model, CONTEXT, SEGMENTS).attach(model):
        model.config.eos_token_id = 7
    assert model.config.eos_token_id == 7
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_two_models_at_once():
    """Two models attached at the same time, made from one config object, beside a third one that is not attached."""
    first = make_model("llama", seed=0)
    second = copy.deepcopy(first)
    third = copy.deepcopy(first)
    for module in (*second.modules(), *third.modules()):
        if hasattr(module, "config"):
            module.config = first.config
    for parameter in second.parameters():
        parameter.mul_(1.1)
    other = tokens(9, seed=5)
    prefixes = (
        KVPrefix.from_tokens(first, CONTEXT, SEGMENTS),
        KVPrefix.from_tokens(second, other, torch.tensor([0, 9])),
    )
    expected = stock_logits(first, CONTEXT, ROW[0]), stock_logits(second, other, ROW[0]), third(ROW).logits[0]
    with prefixes[0].attach(first):
        with prefixes[1].attach(second):
            inner = first(ROW).logits[0], second(ROW).logits[0], third(ROW).logits[0]
        again = first(ROW).logits[0]
        assert third.config._attn_implementation == "sdpa"
    for actual, wanted in zip((*inner, again), (*expected, expected[0]), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_threads_share_an_attached_model(name):
    model = make_model(name)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    rows = [tokens(1, 3 + i, seed=i) for i in range(4)]
    results: list = [None] * len(rows)

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                results[i] = model(rows[i]).logits

    with prefix.attach(model):
        with torch.no_grad():
            expected = [model(row).logits for row in rows]
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(rows))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("name", ["llama", "bloom", "stablelm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_uses_the_mask_of_its_forward(name, reentrant):
    """Two forwards with two masks, then one backward: checkpointing recomputes each layer under its own mask."""
    model = make_model(name)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    masks = [ContextMask.leave_one_out(prefix.segments, torch.tensor([i])) for i in (0, 1)]

    def gradients() -> list[torch.Tensor]:
        prefix.zero_grad()
        with prefix.attach(model) as attachment:
            loss = 0.0
            for mask in masks:
                attachment.mask = mask
                loss = loss + model(ROW).logits.square().sum()
            attachment.mask = None
            loss.backward()
        return [p.grad.clone() for p in prefix.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    for actual, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_from_embeddings(llama, prefix, reentrant):
    """Embeddings that need no gradient do not cut the prefix off from a reentrant checkpoint."""
    model = make_model("llama")
    embeddings = model.get_input_embeddings()(ROW)

    def gradients() -> list[torch.Tensor]:
        prefix.zero_grad()
        with prefix.attach(model):
            model(inputs_embeds=embeddings, use_cache=False).logits.square().sum().backward()
        return [p.grad.clone() for p in prefix.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    for actual, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    assert not embeddings.requires_grad


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_after_the_block(name, reentrant):
    """Without checkpointing the block may be left before backward; with it, layers would be recomputed bare."""
    model = make_model(name)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    with prefix.attach(model):
        loss = model(ROW, attention_mask=torch.ones_like(ROW)).logits.sum()
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in prefix.parameters())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    with prefix.attach(model):
        loss = model(ROW, attention_mask=torch.ones_like(ROW)).logits.sum()
    with pytest.raises(ValueError, match=r"call backward\(\) inside the block"):
        loss.backward()
    with prefix.attach(model):
        loss = model(ROW, attention_mask=torch.ones_like(ROW)).logits.sum()
    with prefix.attach(model), pytest.raises(ValueError, match=r"call backward\(\) inside the block"):
        loss.backward()


def test_first_layer_computes_no_row_gradients(llama, prefix, monkeypatch):
    """With frozen weights only the prefix needs a gradient in the first layer."""
    seen = []
    original = hf_attention.prefix_attention

    def spy(q, k, v, *args, **kwargs):
        seen.append([x.requires_grad for x in (q, k, v)])
        return original(q, k, v, *args, **kwargs)

    monkeypatch.setattr(hf_attention, "prefix_attention", spy)
    with prefix.attach(llama):
        llama(ROW)
    assert seen == [[False] * 3, [True] * 3, [True] * 3]


def test_prefix_is_read_in_place(llama, prefix, monkeypatch):
    seen = []
    original = hf_attention.prefix_attention

    def spy(q, k, v, prefix_k, prefix_v, *args, **kwargs):
        seen.append((prefix_k, prefix_v))
        return original(q, k, v, prefix_k, prefix_v, *args, **kwargs)

    monkeypatch.setattr(hf_attention, "prefix_attention", spy)
    with prefix.attach(llama):
        llama(ROW.expand(5, -1))
    assert all(k is key and v is value for (k, v), key, value in zip(seen, prefix.keys, prefix.values, strict=True))


@pytest.mark.parametrize("name", ["llama", "bloom", "stablelm"])
def test_compiled(name):
    """torch.compile traces an attached model without graph breaks, to the same logits and prefix gradients."""
    model = make_model(name, torch.float32)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    mask = ContextMask(hidden=torch.tensor([[0, 5], [5, 12]]))
    rows = tokens(2, 7, seed=3)
    results = []
    with prefix.attach(model, mask=mask):
        for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            prefix.zero_grad()
            logits = forward(rows, use_cache=False).logits
            logits.square().sum().backward()
            results.append([logits.detach(), *(p.grad.clone() for p in prefix.parameters())])
    torch._dynamo.reset()
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_compiled_generation():
    """`generate` compiles the decoding steps of a static cache."""
    model = make_model("gemma2", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    ids, mask = pad_rows([tokens(3), tokens(7)], "left")
    compiled = transformers.CompileConfig(fullgraph=False, backend="eager", mode=None)
    compiled._compile_all_devices = True
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    with prefix.attach(model):
        expected = model.generate(ids, **settings)
        actual = model.generate(ids, **settings, cache_implementation="static", compile_config=compiled)
    torch._dynamo.reset()
    assert torch.equal(actual, expected)


# what is refused


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_attaching_twice(name):
    model = make_model(name)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    with prefix.attach(model):
        with pytest.raises(ValueError, match="already has a prefix attached"), prefix.attach(model):
            pass
        with pytest.raises(ValueError, match="has a prefix attached"):
            KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
        model(ROW)  # the refused attempts have not broken the first one


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_changed_implementation(name):
    model = make_model(name)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    with prefix.attach(model):
        model.config._attn_implementation = "eager"
        with pytest.raises(ValueError, match="changed to 'eager'"):
            model(ROW)
        with pytest.raises(ValueError, match="changed to 'eager'"):
            model.generate(ROW, max_new_tokens=2, attention_mask=torch.ones_like(ROW))


@torch.no_grad()
def test_skipped_layers(llama, prefix):
    """A layer that did not read the prefix is an error, whatever kept it from doing so."""
    model = make_model("llama")
    with prefix.attach(model):
        model.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
        with pytest.raises(ValueError, match=r"layers \[1\] of LlamaForCausalLM did not read the attached prefix"):
            model(ROW)
        with pytest.raises(ValueError, match="outside of its model's forward"):
            hidden = torch.zeros(1, 3, 32, dtype=torch.float64)
            angles = model.model.rotary_emb(hidden, torch.arange(3)[None])
            model.model.layers[0](hidden, position_embeddings=angles)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
@torch.no_grad()
def test_forward_called_past_the_hooks(name):
    """`forward` of the decoder instead of a call of it would leave positions and masks unset."""
    model = make_model(name)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    decoder = find_decoder(model).base
    with prefix.attach(model):
        model(ROW)
        for mask in (None, torch.ones_like(ROW)):
            with pytest.raises(ValueError, match="outside of its model's forward"):
                decoder.forward(ROW, attention_mask=mask)


def test_layerdrop_is_noticed():
    model = make_model("opt", layerdrop=0.999, dropout=0.0)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    torch.manual_seed(0)
    with prefix.attach(model.train()), pytest.raises(ValueError, match=r"layers \[0, 1, 2\] of OPTForCausalLM did not"):
        model(ROW)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama"])
def test_attention_dropout(name):
    changes = {"attn_pdrop": 0.1} if name == "gpt2" else {"attention_dropout": 0.1}
    model = make_model(name, **changes)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    with prefix.attach(model):
        model.train()
        with pytest.raises(ValueError, match=r"attention dropout 0\.1 is not supported.*model\.eval\(\)"):
            model(ROW)
        model.eval()
        model(ROW)


def test_unsupported_classes(prefix):
    openai = transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(n_embd=8, n_layer=1, n_head=2, vocab_size=9)
    )
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    for model, why in ((openai, r"it computes attention itself \(Attention\)"), (mamba, "it has no attention")):
        for use in (prefix.attach, lambda m: KVPrefix.from_tokens(m, CONTEXT, SEGMENTS)):
            with pytest.raises(TypeError, match=f"model class {type(model).__name__} is not supported: {why}"):
                use(model)
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        prefix.attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="add_cross_attention=True: only decoders without"):
        find_decoder(make_model("gpt2", add_cross_attention=True))


def test_models_wrapped_by_peft(llama):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(llama), LoraConfig(target_modules=["q_proj"]))
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    with torch.no_grad(), prefix.attach(model):
        torch.testing.assert_close(model(ROW).logits[0], stock_logits(llama, CONTEXT, ROW[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_masks_that_are_not_padding(name):
    model = make_model(name)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    causal = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    with prefix.attach(model):
        for mask in (causal, causal.double(), causal[0]):
            with pytest.raises(ValueError, match="must be a 2D padding mask"):
                model(ROW, attention_mask=mask)
        hole = torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
        with pytest.raises(ValueError, match="rows are one run of ones"):
            model(ROW, attention_mask=hole)
        covers_prefix = torch.ones(1, 12 + 7, dtype=torch.long)
        with pytest.raises(ValueError, match=r"own tokens alone, \[1, 7\], got \[1, 19\]"):
            model(ROW, attention_mask=covers_prefix)


@torch.no_grad()
def test_cached_rows_with_holes(llama, prefix):
    """A cached row that ends before the last query, or has a hole, is not where the op would put it."""
    with prefix.attach(llama):
        cache = llama(ROW.expand(2, -1), use_cache=True).past_key_values
        for place in (-1, 6, 2):  # behind the row, and holes
            mask = torch.ones(2, 9, dtype=torch.long)
            mask[0, place] = 0
            with pytest.raises(ValueError, match="rows are one run of ones"):
                llama(tokens(2, 2), attention_mask=mask, past_key_values=copy.deepcopy(cache))


@torch.no_grad()
def test_packed_rows_that_do_not_fit(llama, prefix):
    packed = tokens(1, 9)
    with prefix.attach(llama) as attachment:
        attachment.cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
        with pytest.raises(ValueError, match="attention_mask must be None: packed rows have no padding"):
            llama(packed, attention_mask=torch.ones_like(packed))
        with pytest.raises(ValueError, match=r"one packed sequence .* got a batch of 2"):
            llama(packed.expand(2, -1))
        with pytest.raises(ValueError, match="past_key_values must be None"):
            llama(packed, past_key_values=transformers.DynamicCache())
        attachment.cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens must start at 0, never decrease and end at N = 9"):
            llama(packed)
        attachment.cu_seqlens = [0, 4, 9]
        with pytest.raises(TypeError, match=r"attachment\.cu_seqlens must be an int32 tensor"):
            llama(packed)


@torch.no_grad()
def test_masks_that_do_not_fit(llama, prefix):
    with prefix.attach(llama, mask=ContextMask(hidden=torch.tensor([[0, 5], [5, 12]]))) as attachment:
        with pytest.raises(ValueError, match=r"mask\.hidden must have shape \[1, 2\]"):
            llama(ROW)
        attachment.mask = torch.ones(1, 12, dtype=torch.bool)
        with pytest.raises(TypeError, match=r"attachment\.mask must be a ContextMask"):
            llama(ROW)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@torch.no_grad()
def test_learned_positions_run_out(name):
    limit = {"gpt2": "n_positions", "opt": "max_position_embeddings"}[name]
    model = make_model(name, **{limit: 16})
    with pytest.raises(ValueError, match=r"have 17 tokens, more than the model's context of 16"):
        KVPrefix.from_tokens(model, tokens(17), torch.tensor([0, 17]))
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    ids, mask = pad_rows([tokens(4), tokens(2)], "right")
    padded = torch.nn.functional.pad(ids, (0, 1), value=PAD), torch.nn.functional.pad(mask, (0, 1))
    with prefix.attach(model) as attachment:
        with pytest.raises(ValueError, match=r"rows of 5 own tokens after a prefix of 12 positions need 17 .* has 16"):
            model(tokens(1, 5))
        model(padded[0], attention_mask=padded[1])  # rows of 4 and 2 tokens fit, whatever the padding
        attachment.cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
        model(tokens(1, 8))
        attachment.cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
        with pytest.raises(ValueError, match="need 17 positions"):
            model(tokens(1, 8))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_context_longer_than_declared(name):
    model = make_model(name, max_position_embeddings=10)
    with pytest.raises(ValueError, match=r"have 12 tokens, more than the model's context of 10"):
        KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)


def longrope(**changes):
    factors = {"short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **factors}
    return make_model("phi3", rope_parameters=rope, original_max_position_embeddings=16, sliding_window=None, **changes)


@torch.no_grad()
def test_rotary_frequencies_that_depend_on_length():
    """Rows may not pass the position where longrope rotates all keys anew; beyond it, all is well again."""
    model = longrope()
    with KVPrefix.from_tokens(model, CONTEXT, SEGMENTS).attach(model):
        model(tokens(1, 4))
        with pytest.raises(ValueError, match=r"rows of 7 own tokens .* pass position 16"):
            model(ROW)
    context = tokens(20, seed=9)
    prefix = KVPrefix.from_tokens(model, context, torch.tensor([0, 20]))
    expected = stock_logits(model, context, ROW[0])
    with prefix.attach(model):
        torch.testing.assert_close(model(ROW).logits[0], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_static_cache_without_positions():
    """Whisper's head passes no position_ids on, and a mask that is prepared ahead does not say them."""
    config = transformers.WhisperConfig(
        **SIZES, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=40, max_target_positions=64
    )
    torch.manual_seed(0)
    model = transformers.WhisperForCausalLM(config).double().eval()
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    ids, mask = pad_rows([tokens(3), tokens(7)], "left")
    settings = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(torch.cat((CONTEXT, ids[0, 4:]))[None], **settings)[0, -3:]
    with prefix.attach(model):
        assert torch.equal(model.generate(ids, attention_mask=mask, **settings)[0, -3:], expected)
        row = {"attention_mask": torch.ones(1, 3, dtype=torch.int64), "cache_implementation": "static"}
        assert torch.equal(model.generate(ids[:1, 4:], **row, **settings)[0, -3:], expected)
        with pytest.raises(ValueError, match="static cache cannot have rows padded on the left"):
            model.generate(ids, attention_mask=mask, cache_implementation="static", **settings)


def test_prefix_for_another_model(prefix):
    for changes, message in (
        ({"num_hidden_layers": 2}, "prefix has 3 layers, LlamaForCausalLM has 2"),
        ({"num_key_value_heads": 4}, "2 KV heads of dimension 8, LlamaForCausalLM has 4"),
        ({"head_dim": 16}, "of dimension 16"),
        (
            {"rms_norm_eps": 0.5, "attention_bias": True},
            "this LlamaForCausalLM '' has attention_bias true instead of false, rms_norm_eps 0.5 instead of 1e-06$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prefix.attach(make_model("llama", **changes))
    with pytest.raises(TypeError, match=r"must be torch\.float32 .* got torch\.float64"):
        prefix.attach(make_model("llama", torch.float32))
    with pytest.raises(ValueError, match="prefix layer 0 is on meta, the layer is on cpu"):
        copy.deepcopy(prefix).to("meta").attach(make_model("llama"))


def test_alibi_needs_consecutive_positions():
    model = make_model("bloom")
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    prefix.first_position = 20
    with pytest.raises(ValueError, match="first_position must be the prefix's length 12, got 20"):
        prefix.attach(model)
    prefix.first_position = 12
    model.transformer.h[1].self_attention.forward = model.transformer.h[1].self_attention.forward
    with pytest.raises(ValueError, match="forward of a BloomAttention has been replaced"), prefix.attach(model):
        pass
    assert "build_alibi_tensor" not in vars(model.transformer)


@torch.no_grad()
def test_unknown_backend(llama, prefix):
    with prefix.attach(llama, backend="abacus"), pytest.raises(ValueError, match="backend must be one of"):
        llama(ROW)


def test_nothing_that_was_decided_outlives_what_it_depended_on():
    """One attachment through changes of mask, mode, prefix and layout: each pass has the bits of a fresh attachment."""
    model, rows = make_model("llama", torch.float32), tokens(2, 6)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    start = prefix.keys[0].detach().clone()
    spans, drops = ContextMask(hidden=torch.tensor([[0, 3], [3, 6]])), ContextMask(drop_p=0.5, seed=4)
    ways = [(way, mask) for way in ("gradient", "none", "training", "gradient") for mask in (None, spans, drops)]
    ways[3:3] = [("packed", drops), ("packed", None)]

    def run(attachment, number: int) -> list[torch.Tensor]:
        way, mask = ways[number]
        model.train(way == "training")
        with torch.no_grad():
            prefix.keys[0].copy_(start * (1 + number))
        attachment.mask, packed = mask, way == "packed"
        attachment.cu_seqlens = torch.tensor([0, 2, 6, 12], dtype=torch.int32) if packed else None
        with torch.set_grad_enabled(way != "none"):
            logits = model(rows.view(1, -1) if packed else rows).logits
        gradients = torch.autograd.grad(logits.sum(), [*prefix.keys, *prefix.values]) if way != "none" else ()
        return [logits.detach(), *gradients]

    with prefix.attach(model) as attachment:
        found = [run(attachment, number) for number in range(len(ways))]
    for number, (way, mask) in enumerate(ways):
        with prefix.attach(model) as fresh:
            expected = run(fresh, number)
        assert all(torch.equal(x, y) for x, y in zip(found[number], expected, strict=True)), (way, mask)
