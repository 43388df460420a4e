"""An attachment without `with`, one that was never entered, copies of an attached model, and caches, which belong to
the attachment that filled them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import time
import warnings

import peft
import pytest
import torch
from transformers import DynamicCache, StaticCache

from ctkernels.testing.models import MODELS, full_precision_softmax, make_model, pad_rows, stock_logits, tokens
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.adapters.prefix_set import PrefixSet
from ctkernels.tuning.hf.models import find_decoder
from tests.tuning.hf.test_models_attach import snapshot

CONTEXT = tokens(12, seed=2)
SEGMENTS = torch.tensor([0, 5, 12])
ROW = tokens(1, 7, seed=3)
KINDS = ["llama", "gpt2", "bloom"]


@pytest.fixture(autouse=True, scope="module")
def exact():
    with full_precision_softmax():
        yield


def attachable(name: str = "llama"):
    model = make_model(name)
    return model, KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# enable, detach


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_enable_and_detach(name):
    model, prefix = attachable(name)
    before, plain, expected = snapshot(model), model(ROW).logits, stock_logits(model, CONTEXT, ROW[0])[None]
    attachment = prefix.attach(model)
    assert attachment.enable() is attachment
    close(model(ROW).logits, expected)
    with pytest.raises(ValueError, match="already has a prefix attached"):
        attachment.enable()
    attachment.detach()
    attachment.detach()
    assert torch.equal(model(ROW).logits, plain)
    assert snapshot(model) == before
    with attachment:  # once more, the same
        close(model(ROW).logits, expected)
        attachment.detach()
        assert torch.equal(model(ROW).logits, plain)
    assert snapshot(model) == before


@torch.no_grad()
def test_never_entered():
    """The model says so when it runs, once; else the attachment says so when it is gone."""
    model, prefix = attachable()
    before = snapshot(model)
    attachment = prefix.attach(model)
    with pytest.warns(UserWarning, match=r"was not entered, so the model ran without the prefix; use `with prefix"):
        model(ROW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ROW)
        with attachment:
            model(ROW)
        del attachment
        prefix.attach(model).detach()
        prefix.attach(model).enable().detach()
        gc.collect()
    with pytest.warns(UserWarning, match="was never entered, so the model ran without the prefix"):
        prefix.attach(model)
        gc.collect()
    assert snapshot(model) == before


@torch.no_grad()
def test_made_ahead_and_entered_later(recwarn):
    """Not a word about another attachment that is entered meanwhile, nor about copies of the model."""
    model, prefix = attachable()
    later = prefix.attach(model)
    with prefix.attach(model):
        model(ROW)
    later = prefix.attach(model)
    copy.deepcopy(model)(ROW)
    with later:
        model(ROW)
    assert not recwarn.list


# copies


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_copy_is_a_plain_model(name):
    model, prefix = attachable(name)
    plain, expected, before = model(ROW).logits, stock_logits(model, CONTEXT, ROW[0])[None], snapshot(model)
    with prefix.attach(model):
        copied, base = copy.deepcopy(model), copy.deepcopy(find_decoder(model).base)
        close(model(ROW).logits, expected)
        assert torch.equal(copied(ROW).logits, plain)
    after = snapshot(copied)
    for each in (before, after):
        each.pop("config objects")
    assert after == before
    assert type(copied) is type(model) and copied.config is not model.config
    assert base.config._attn_implementation == before["implementation"]
    close(base(ROW)[0], find_decoder(model).base(ROW)[0])
    with prefix.attach(copied):
        close(copied(ROW).logits, expected)
        assert torch.equal(model(ROW).logits, plain)


def test_copies_inside_others():
    """Wrapped by peft, and in a container; the copy shares no weights."""
    model, prefix = attachable()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    with torch.no_grad():
        plain = wrapped(ROW).logits
        with prefix.attach(wrapped):
            copied = copy.deepcopy({"model": wrapped})["model"]
        assert torch.equal(copied(ROW).logits, plain)
    own = {p.data_ptr() for p in wrapped.parameters()}
    assert not own & {p.data_ptr() for p in copied.parameters()}


def test_parts_are_not_copied():
    model, prefix = attachable()
    with prefix.attach(model) as attachment:
        for copied in (
            lambda: copy.deepcopy(attachment),
            lambda: copy.deepcopy(model.model.layers[0]),
            lambda: pickle.dumps(model),
            lambda: torch.save(model, io.BytesIO()),
        ):
            with pytest.raises(TypeError, match="cannot be copied or pickled while a prefix is attached"):
                copied()
    pickle.dumps(model)


# caches


def filled(model, **settings) -> DynamicCache:
    return model(ROW[:, :4], use_cache=True, **settings).past_key_values


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_cache_of_the_plain_model(name):
    model, prefix = attachable(name)
    cache = filled(model)
    with prefix.attach(model), pytest.raises(ValueError, match="filled without the attached prefix"):
        model(ROW[:, 4:], past_key_values=cache)
    model(ROW[:, 4:], past_key_values=cache)  # it has not been touched


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("made", ["by the model", "ahead", "static"])
@torch.no_grad()
def test_a_cache_of_an_attached_model(name, made):
    model, prefix = attachable(name)
    expected = stock_logits(model, CONTEXT, ROW[0])[None]
    given = {
        "by the model": {},
        "ahead": {"past_key_values": DynamicCache(config=model.config)},
        "static": {"past_key_values": StaticCache(config=model.config, max_cache_len=9)},
    }[made]
    attachment = prefix.attach(model)
    with attachment:
        cache = filled(model, **given)
        assert isinstance(cache, StaticCache if made == "static" else DynamicCache)
    for continued in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        with pytest.raises(ValueError, match="filled under an attached prefix, which is not attached any more"):
            model(ROW[:, 4:], past_key_values=continued)
    with prefix.attach(model), pytest.raises(ValueError, match="filled under another attachment"):
        model(ROW[:, 4:], past_key_values=cache)
    with attachment:
        close(model(ROW[:, 4:], past_key_values=copy.deepcopy(cache)).logits, expected[:, 4:])
        close(model(ROW[:, 4:], past_key_values=cache).logits, expected[:, 4:])
    if made == "static":
        cache.reset()  # empty again: anybody's
        with prefix.attach(model):
            close(model(ROW, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_caches_of_several_prefixes():
    model, prefix = attachable()
    both = PrefixSet([prefix, prefix])
    rows = ROW[:, :4].expand(2, -1)
    with both.attach(model, [0, 1]):
        cache = model(rows, use_cache=True).past_key_values
        model(rows, past_key_values=cache)
    with pytest.raises(ValueError, match="not attached any more"):
        model(rows, past_key_values=cache)


def test_beams_and_groups_of_rows():
    """What generation does with a cache between two steps: copies rows, reorders beams, cuts off."""
    model, prefix = attachable()
    ids, mask = pad_rows([tokens(3), tokens(7)], "left")
    settings = {"attention_mask": mask, "max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2}
    with prefix.attach(model):
        out = model.generate(ids, do_sample=False, **settings, return_dict_in_generate=True)
        expected = model.generate(ids, do_sample=False, **settings, use_cache=False)
    assert torch.equal(out.sequences, expected)
    with pytest.raises(ValueError, match="not attached any more"):
        model(out.sequences[:, -1:], past_key_values=out.past_key_values)


@pytest.mark.parametrize("use_cache", [True, False])
def test_leaving_while_a_thread_generates(use_cache):
    """It raises in that thread: at its next forward if there is a cache, else when it would have returned."""
    model, prefix = attachable()
    started, errors, steps = threading.Event(), [], []

    def slow(module, args, kwargs, output):
        steps.append(1)
        started.set()
        time.sleep(0.02)

    def run():
        try:
            model.generate(ROW, max_new_tokens=20, do_sample=False, use_cache=use_cache)
        except ValueError as error:
            errors.append(str(error))

    handle = model.register_forward_hook(slow, with_kwargs=True)
    thread = threading.Thread(target=run)
    with prefix.attach(model):
        thread.start()
        started.wait()
    left = len(steps)
    thread.join()
    handle.remove()
    assert len(errors) == 1
    if use_cache:
        assert "was the attach block left while a generation ran?" in errors[0] and len(steps) <= left + 1
    else:
        assert "the attach block was left while generate() of LlamaForCausalLM ran" in errors[0]


# peft models with virtual tokens


@pytest.mark.parametrize(
    "settings",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda settings: settings.peft_type.value,
)
@torch.no_grad()
def test_virtual_tokens_of_peft(settings):
    """peft computes [virtual, context, row]; a prefix before its model would be [context, virtual, row]."""
    model, prefix = attachable()
    expected = stock_logits(model, CONTEXT, ROW[0])[None]
    wrapped = peft.get_peft_model(model, settings)
    for refused in (lambda: prefix.attach(wrapped), lambda: KVPrefix.from_tokens(wrapped, CONTEXT, SEGMENTS)):
        with pytest.raises(ValueError, match=r"virtual tokens of its own \(\w+\).* use its base model"):
            refused()
    with prefix.attach(wrapped.get_base_model()):
        close(model(ROW).logits, expected)
