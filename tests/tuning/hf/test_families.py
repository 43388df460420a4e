"""Kinds of models that need something of their own: each is proved, and its proof fails without that."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import GenerationConfig

from ctkernels import ContextMask
from ctkernels.testing.models import GROUPED, make_model, stock_logits, tokens
from ctkernels.tuning.adapters.peft_export import export_peft
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.adapters.prefix_set import PrefixSet
from ctkernels.tuning.hf import attach, attention, discover, models, prove
from ctkernels.tuning.hf.discover import Borrower, find_layout
from ctkernels.tuning.hf.exact import full_precision
from ctkernels.tuning.hf.kinds import Reach
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.hf.rotary import check_fixed_rotation
from ctkernels.tuning.hf.served import trusting
from ctkernels.tuning.hf.tiny import make_tiny, shrink

# what it is -> (configuration class, model class, settings)
KINDS = {
    "sinks": ("GptOssConfig", "GptOssForCausalLM", {}),
    "sinks after a scale": ("GraniteSWAConfig", "GraniteSWAForCausalLM", {}),
    "sinks in some layers, narrower values": ("MiMoV2FlashConfig", "MiMoV2FlashForCausalLM", {}),
    "latent": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {}),
    "latent, one head": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {"num_experts_per_tok": 2}),
    "two attentions in a layer": ("LongcatFlashConfig", "LongcatFlashForCausalLM", {}),
    "repeated heads": ("JetMoeConfig", "JetMoeForCausalLM", {}),
    "borrowed keys": ("Gemma3nTextConfig", "Gemma3nForCausalLM", {}),
    "borrowed keys, heads of several sizes": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {"num_hidden_layers": 12, "num_kv_shared_layers": 6},
    ),
    "a window in the mask": ("PhimoeConfig", "PhimoeForCausalLM", {"sliding_window": 2047}),
    "a window in the mask of some layers": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {"use_sliding_window": True, "max_window_layers": 1},
    ),
    "chunks": ("Llama4TextConfig", "Llama4ForCausalLM", {}),
    "images, masks": ("Gemma3Config", "Gemma3ForConditionalGeneration", {}),
    "images, masks, borrowed keys": ("Gemma4Config", "Gemma4ForConditionalGeneration", {}),
    "images, blocks in masks": ("Gemma4UnifiedConfig", "Gemma4UnifiedForConditionalGeneration", {}),
    "images": ("LlavaConfig", "LlavaForConditionalGeneration", {}),
    "images, merged patches": ("Mistral3Config", "Mistral3ForConditionalGeneration", {}),
    "images, positions in three dimensions": (
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}},
    ),
    "images in cross attention": ("MllamaConfig", "MllamaForCausalLM", {}),
    "a class of the sequence": ("LlamaConfig", "LlamaForSequenceClassification", {}),
    "a class of each token": ("LlamaConfig", "LlamaForTokenClassification", {}),
}


def config_of(kind: str):
    config_name, model_name, settings = KINDS[kind]
    model_class = getattr(transformers, model_name)
    config = getattr(transformers, config_name)(**settings)
    if not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)
    return model_class, config


def verdict_of(kind: str):
    model_class, config = config_of(kind)
    with torch.device("meta"):
        layout = find_layout(model_class._from_config(shrink(config)))
    return prove(model_class, config, layout)


def tiny_of(kind: str):
    model_class, config = config_of(kind)
    return make_tiny(model_class, shrink(config))


@pytest.mark.parametrize("kind", KINDS)
def test_served(kind):
    verdict = verdict_of(kind)
    assert verdict.reason is None, verdict.reason
    assert verdict.difference < 1e-12 and verdict.effect > 1e-2


def without_sinks(monkeypatch):
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args, sinks=None, **kwargs: attend(*args, **kwargs))


def without_rotated_part(monkeypatch):
    def expand_of(module):
        return lambda latent, rotated: module.expand_kv(latent, torch.zeros_like(rotated))

    monkeypatch.setattr(attention, "expand_of", expand_of)


def with_heads_side_by_side(monkeypatch):
    def expand_of(module):
        return lambda *held: tuple(x.repeat_interleave(module.top_k, dim=1) for x in held)

    monkeypatch.setattr(attention, "expand_of", expand_of)


def with_another_lender(monkeypatch):
    monkeypatch.setattr(discover, "Borrower", lambda layer, own, source: Borrower(layer, own, source - 2))


def without_reach(monkeypatch):
    monkeypatch.setattr(models, "reach_of", lambda base, module: Reach())


def without_temper(monkeypatch):
    monkeypatch.setattr(attention, "tempered", lambda module, query, state, index: query)


def without_own_positions(monkeypatch):
    monkeypatch.setattr(attach.Attachment, "_enter", lambda self, model, args, kwargs: None)


@pytest.mark.parametrize(
    "kind, mutate",
    [
        ("sinks", without_sinks),
        ("latent", without_rotated_part),
        ("repeated heads", with_heads_side_by_side),
        ("borrowed keys", with_another_lender),
        ("a window in the mask", without_reach),
        ("a window in the mask of some layers", without_reach),
        ("chunks", without_reach),
        ("chunks", without_temper),
        ("images, masks", without_own_positions),
    ],
)
def test_a_mistake_is_found(kind, mutate, monkeypatch):
    mutate(monkeypatch)
    reason = verdict_of(kind).reason
    assert reason is not None and ("results differ by" in reason or "failed" in reason)


# what the proof does not do


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture
def exact():
    with full_precision(), trusting(), torch.no_grad():
        yield


CONTEXT, ROW = tokens(11, seed=2), tokens(7, seed=3)
SEGMENTS = torch.tensor([0, 4, 11])


def stock(model, *parts, **inputs):
    return model(input_ids=torch.cat(parts)[None], **inputs).logits[0]


def test_fewer_logits_of_padded_rows(exact):
    """Gemma 4 leaves queries out in layers that borrow keys, if fewer logits are asked for."""
    model = tiny_of("borrowed keys, heads of several sizes")
    expected = stock(model, CONTEXT, ROW)[len(CONTEXT) :]
    ids, mask = torch.nn.functional.pad(ROW, (0, 2))[None], torch.tensor([[1] * len(ROW) + [0] * 2])
    with KVPrefix.from_tokens(model, CONTEXT, SEGMENTS).attach(model):
        close(model(ids, attention_mask=mask, logits_to_keep=4).logits[0, :2], expected[-2:])
        close(model(ids, attention_mask=mask, logits_to_keep=torch.tensor([2, 3])).logits[0], expected[2:4])


def test_masks_and_sets_of_prefixes_in_chunks(exact):
    """Chunks count along each row's own prefix, whatever is hidden in it."""
    model = tiny_of("chunks")
    contexts = tokens(11, seed=4), tokens(6, seed=5)
    prefixes = [KVPrefix.from_tokens(model, context, torch.tensor([0, len(context)])) for context in contexts]
    rows = torch.stack((ROW, tokens(7, seed=6)))
    expected = [stock(model, context, row)[len(context) :] for context, row in zip(contexts, rows, strict=True)]
    with PrefixSet(prefixes).attach(model, prefix_index=torch.tensor([0, 1])):
        close(model(rows).logits, torch.stack(expected))
    with prefixes[0].attach(model, mask=ContextMask(hidden=torch.tensor([[9, 11]]))):
        assert (model(ROW[None]).logits[0] - expected[0]).abs().max() > 1e-3


def test_latents_cannot_be_moved(exact):
    """The rotated part of latent attention's keys is kept in place of values."""
    with pytest.raises(ValueError, match="how DeepseekV3ForCausalLM rotates them is not known"):
        check_fixed_rotation(find_decoder(tiny_of("latent")), "this")
    with pytest.raises(ValueError, match="scales queries by their position"):
        check_fixed_rotation(find_decoder(tiny_of("chunks")), "this")


@pytest.mark.parametrize("kind", ["latent", "sinks in some layers, narrower values"])
def test_a_prefix_of_values_unlike_keys(kind, tmp_path):
    """Saved, loaded and trained with checkpointing, in fp32."""
    with trusting():
        model = tiny_of(kind).float()
        made = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
        with torch.no_grad():
            expected = stock(model, CONTEXT, ROW)[len(CONTEXT) :]
        made.save_pretrained(tmp_path)
        prefix = KVPrefix.from_pretrained(tmp_path, model=model)
        model.gradient_checkpointing_enable()
        with prefix.attach(model.train()):
            logits = model(ROW[None], use_cache=False).logits[0]
            logits.square().mean().backward()
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        assert all(x.grad.abs().max() > 0 for x in prefix.parameters())
        with pytest.raises(ValueError, match="peft keeps keys and values of all layers in one tensor"):
            export_peft(prefix, tmp_path / "peft")
        prefix.values[0] = nn.Parameter(prefix.values[0][..., :-1].detach())
        with pytest.raises(ValueError, match="prefix layer 0 has values of dimension"):
            prefix.attach(model)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGE = 60


def llava():
    text = {**GROUPED, "model_type": "llama"}
    vision = {**VISION, "model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).double().eval().requires_grad_(False)


def test_rows_with_images(exact):
    model = llava()
    pixels = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    row = torch.cat((ROW[:2], torch.full((4,), IMAGE), ROW[2:]))
    context = torch.where(CONTEXT == IMAGE, 5, CONTEXT)
    expected = stock(model, context, row, pixel_values=pixels)[len(context) :]
    with KVPrefix.from_tokens(model, context, SEGMENTS).attach(model) as attachment:
        close(model(input_ids=row[None], pixel_values=pixels).logits[0], expected)
        ids, mask = torch.nn.functional.pad(row, (3, 0))[None], torch.tensor([[0] * 3 + [1] * len(row)])
        close(model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[0, 3:], expected)
        attachment.cu_seqlens = torch.tensor([0, len(row)])
        with pytest.raises(ValueError, match="must be text alone, got pixel_values"):
            model(input_ids=row[None], pixel_values=pixels)


def test_images_that_see_ahead(exact):
    """Tokens of an image see each other in Gemma 3: no rule of the op. Its processor numbers text, too."""
    model = tiny_of("images, masks")
    expected = stock(model, CONTEXT, ROW)[len(CONTEXT) :]
    with KVPrefix.from_tokens(model, CONTEXT, SEGMENTS).attach(model):
        close(model(input_ids=ROW[None], token_type_ids=torch.zeros(1, 7, dtype=torch.int64)).logits[0], expected)
    with (
        KVPrefix.from_tokens(model, CONTEXT, SEGMENTS).attach(model),
        pytest.raises(ValueError, match="must be a 2D padding mask"),
    ):
        model(input_ids=ROW[None], token_type_ids=torch.tensor([[0, 1, 1, 1, 0, 0, 0]]))


def test_a_decoder_inside_of_another_model_is_left_as_it_was(exact):
    """Configurations are shared between models, and hold one another."""
    model = tiny_of("images, masks")
    other = copy.copy(model)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    inside, plain = model.config.text_config, stock(model, ROW)
    with KVPrefix.from_tokens(model, CONTEXT, SEGMENTS).attach(model):
        assert inside._attn_implementation == "eager" and other.config.text_config is not None
        copied = copy.deepcopy(model)
    assert all(
        a is b.config for a, b in zip(configs, (m for m in model.modules() if hasattr(m, "config")), strict=True)
    )
    assert model.config.text_config is inside and torch.equal(stock(model, ROW), plain)
    assert torch.equal(stock(copied, ROW), plain)


def test_generation_inside_of_another_model(exact):
    model = tiny_of("images, masks")
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    whole = model.generate(torch.cat((CONTEXT, ROW))[None], generation_config=settings)[0, len(CONTEXT) :]
    with KVPrefix.from_tokens(model, CONTEXT, SEGMENTS).attach(model):
        assert torch.equal(model.generate(ROW[None], generation_config=settings)[0], whole)


# wrappers


@torch.no_grad()
def test_a_compiled_model():
    """Attached before and after it first ran, and detached."""
    model = make_model("llama")
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    plain, expected = model(ROW[None]).logits, stock_logits(model, CONTEXT, ROW)[None]
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with prefix.attach(compiled):
            torch.testing.assert_close(compiled(ROW[None]).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled(ROW[None]).logits, plain, rtol=1e-5, atol=1e-5)
    assert find_decoder(compiled).model is model


@torch.no_grad()
def test_data_parallel():
    model = make_model("llama")
    wrapped, expected = nn.DataParallel(model), stock_logits(model, CONTEXT, ROW)[None]
    with KVPrefix.from_tokens(wrapped, CONTEXT, SEGMENTS).attach(wrapped):
        torch.testing.assert_close(wrapped(ROW[None]).logits, expected, rtol=1e-5, atol=1e-5)
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"copies the model to 2 devices .* use its module: model\.module"):
        find_decoder(wrapped)
