"""Classes that compute attention themselves, or in two halves: their proof, and tiny models of them with a prefix."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from ctkernels import ContextMask
from ctkernels.testing.classes import PUBLISHED
from ctkernels.testing.models import pad_rows, tokens
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.hf import own, proof
from ctkernels.tuning.hf.discover import find_layout
from ctkernels.tuning.hf.exact import full_precision
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.hf.tiny import make_tiny, shrink
from tests.tuning.hf import tiny_classes
from tests.tuning.hf.tiny_classes import CONTEXT, SEGMENTS, check_checkpointing, class_of

CLASSES = {
    "bloom": {},
    "mpt": {},
    "falcon": {},
    "falcon, grouped heads": PUBLISHED["falcon", "Falcon 40B"],
    "gptj": {},
    "codegen": {},
    "gpt_neo": {},
    "gpt_neox_japanese": {},
    "xglm": {},
    "diffllama": {},
}
OWN = [name for name in CLASSES if name != "diffllama"]
DROPOUTS = ("attention_dropout", "attn_dropout", "attn_dropout_p", "dropout")
# the old name, which every transformers 5 knows
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def classes(name: str, **settings):
    return class_of(name.partition(",")[0], **{**CLASSES[name], **settings})


def tiny(name: str, **settings):
    return tiny_classes.tiny(name.partition(",")[0], **{**CLASSES[name], **settings})


def of_class(name: str) -> str:
    return next(row for row in own.OWN if f".{name.partition(',')[0]}." in row)


@pytest.mark.parametrize("name", CLASSES)
def test_proof(name):
    verdict = proof.prove(*classes(name), find_layout(tiny(name)))
    assert verdict.reason is None and verdict.difference < 1e-12 and verdict.effect > 0.1


@pytest.mark.parametrize("name", CLASSES)
def test_a_saved_prefix(name, tmp_path):
    """Written, read and attached, with rows padded on the left: the logits and tokens that follow the whole context."""
    with full_precision():
        model = tiny(name)
        KVPrefix.from_tokens(model, CONTEXT, SEGMENTS).save_pretrained(tmp_path)
        prefix = KVPrefix.from_pretrained(tmp_path, model)
        rows = [tokens(3), tokens(7, seed=4)]
        ids, mask = pad_rows(rows, "left")
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with prefix.attach(model):
            actual = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
        for row, own_tokens in zip(rows, actual, strict=True):
            whole = torch.cat((CONTEXT, row))[None]
            expected = model.generate(whole, attention_mask=torch.ones_like(whole), **settings)
            assert torch.equal(own_tokens, expected[0, whole.shape[1] :])


@pytest.mark.parametrize("name", ["gptj", "gpt_neo", "mpt", "diffllama"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    """Layers that run again find the mask of their own forward pass, although another pass has begun since."""

    def run(model, prefix):
        with prefix.attach(model, mask=ContextMask(hidden=torch.tensor([[0, 5], [5, 12]]))) as attachment:
            loss = model(tokens(2, 6), use_cache=False).logits.square().mean()
            attachment.mask = None
            model(tokens(2, 6), use_cache=False)
            loss.backward()

    check_checkpointing(partial(tiny, name), reentrant, run)


@pytest.mark.parametrize("name", ["bloom", "mpt"])
@pytest.mark.parametrize("heads", [3, 5, 8, 12])
def test_alibi_slopes(name, heads):
    """For numbers of heads that are no power of two, too: against the stock model."""
    with full_precision():
        model_class, config = classes(name)
        config = shrink(config)
        config.num_attention_heads, config.hidden_size = heads, 16 * heads
        model = make_tiny(model_class, config)
        row = tokens(6)
        with torch.no_grad():
            expected = model(torch.cat((CONTEXT, row))[None]).logits[:, len(CONTEXT) :]
            with KVPrefix.from_tokens(model, CONTEXT, SEGMENTS).attach(model):
                actual = model(row[None]).logits
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_grouped_heads_of_falcon():
    shapes = [find_decoder(tiny(name)).shapes[0] for name in ("falcon", "falcon, grouped heads")]
    assert [shape.heads for shape in shapes] == [1, 4]  # one for all; expanded before they are cached


def test_falcon_with_alibi_is_refused():
    with pytest.raises(TypeError, match="FalconForCausalLM is not supported: it rounds its position bias"):
        find_decoder(tiny("falcon", alibi=True))


@pytest.mark.parametrize("name", ["gptj", "codegen"])
def test_the_end_of_a_table_of_angles(name):
    model = tiny(name)
    limit = model.config.max_position_embeddings
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    prefix.first_position = limit - 4
    with prefix.attach(model), pytest.raises(ValueError, match=f"need {limit + 1} positions; .* has {limit}"):
        model(tokens(1, 5))


@pytest.mark.parametrize("name", OWN)
def test_refusals(name):
    model = tiny(name)
    with full_precision():
        prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    attention = find_decoder(model).attentions[1]
    assert re.search(r"\w+$", of_class(name)).group() == type(attention).__name__
    before = sorted(vars(attention))
    with prefix.attach(model):
        with pytest.raises(ValueError, match="rows are one run of ones"):
            model(tokens(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]]))
        model.train()
        dropout = next(n for n in DROPOUTS if hasattr(attention, n))
        is_module = isinstance(getattr(attention, dropout), torch.nn.Dropout)
        setattr(attention, dropout, torch.nn.Dropout(0.1) if is_module else 0.1)
        with pytest.raises(ValueError, match=r"attention dropout 0\.1 is not supported"):
            model(tokens(1, 4))
    assert sorted(vars(attention)) == before
