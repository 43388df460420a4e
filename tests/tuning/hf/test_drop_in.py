"""attn_implementation="ctkernels" on unmodified models without a prefix: the same numbers as transformers' own
attention, whichever of the two a call is routed to."""

import subprocess
import sys

import pytest
import torch
import transformers
from transformers import DynamicCache

from ctkernels.testing.models import GROUPED, MODELS, full_precision_softmax, make_model, pad_rows, tokens
from ctkernels.tuning import hf
from ctkernels.tuning.hf import plain as hf_plain

# said once for each class that is served by transformers; the tests of that are in test_drop_in_steps_aside.py
pytestmark = pytest.mark.filterwarnings("ignore:attn_implementation=.ctkernels.")

ROW = tokens(1, 9)
NAME = hf.IMPLEMENTATION
SERVED = [name for name in MODELS if name != "bloom"]
ROUTES = {"op": 0, "sdpa": 2**62}


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """Every call small, or none: tiny models exercise both sides."""
    monkeypatch.setattr(hf_plain, "SMALL", dict.fromkeys(hf_plain.SMALL, ROUTES[request.param]))
    monkeypatch.setattr(hf_plain, "FEW_KEYS", ROUTES[request.param])
    return request.param


def against_stock(name, calls, **changes):
    """Every call on the stock model and on the same model under "ctkernels"."""
    model = make_model(name, **changes)
    with full_precision_softmax():
        expected = [call(model) for call in calls]
        model.set_attn_implementation(NAME)
        for call, wanted in zip(calls, expected, strict=True):
            torch.testing.assert_close(call(model), wanted, rtol=1e-9, atol=1e-9)


def batch(side, lengths=(4, 9, 1)):
    return pad_rows([tokens(n, seed=n) for n in lengths], side)


def padded(side):
    ids, mask = batch(side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    return lambda model: model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_logits(name, route):
    """No padding, padding on either side, holes; masks of any shape and packed rows, which transformers serves."""
    holes = torch.ones(1, 9, dtype=torch.int64)
    holes[0, [2, 5, 6]] = 0
    dense = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril(-1)
    dense[..., 0] = True
    if name == "gemma2":  # eager adds its mask
        dense = torch.zeros(dense.shape, dtype=torch.float64).masked_fill(~dense, torch.finfo(torch.float64).min)
    restart = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    calls = [lambda model: model(ROW).logits, padded("left"), padded("right")]
    calls += [
        lambda model: model(ROW, attention_mask=holes).logits,
        lambda model: model(ROW, attention_mask=dense, position_ids=torch.arange(9)[None]).logits,
        lambda model: model(ROW, position_ids=restart, use_cache=False).logits,
    ]
    against_stock(name, calls)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
@torch.no_grad()
def test_logits_of_padding(name, route):
    """What is computed at padding is SDPA's, too: it may reach other tokens where a model mixes positions outside of
    attention."""
    ids = torch.cat((tokens(2, 11), tokens(1, 11, seed=3)))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, -4:] = mask[2, 4:6] = 0
    against_stock(name, [lambda model: model(ids, attention_mask=mask).logits])


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_cached_decoding(name, route):
    """A cache filled in pieces of 5, 3 and 1 tokens; generation from a batch padded on the left, with both caches."""

    def pieces(model):
        cache, parts = DynamicCache(config=model.config), []
        for piece in ROW.split((5, 3, 1), dim=1):
            parts.append(model(piece, past_key_values=cache, use_cache=True).logits)
        return torch.cat(parts, dim=1)

    ids, mask = batch("left")

    def generate(**settings):
        return lambda model: model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **settings)

    against_stock(name, [pieces, generate(), generate(cache_implementation="static")])


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_training_gradient(name, side, route):
    """The gradient of every weight, of a padded batch."""
    forward = padded(side)

    def gradients(model):
        model.requires_grad_(True).zero_grad()
        forward(model).square().mean().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters()}

    against_stock(name, [gradients])


@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_dropout(side, route):
    """In training mode with attention dropout a layer is SDPA's, random numbers included."""
    model = make_model("gpt2", attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0).train()
    ids, mask = batch(side)
    results = []
    for implementation in ("sdpa", NAME):
        model.set_attn_implementation(implementation)
        torch.manual_seed(3)
        results.append((model(ROW).logits, model(ids, attention_mask=mask).logits[mask.bool()]))
    for actual, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    assert (results[0][0] - model.eval()(ROW).logits).abs().max() > 1e-3  # there was dropout


def test_softcap_with_dropout(route):
    """Neither the op nor SDPA has both; eager attention has."""
    model = make_model("gemma2", attention_dropout=0.1).train()
    results = []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        torch.manual_seed(3)
        with full_precision_softmax():
            results.append(model(ROW).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    assert (results[0] - model.eval()(ROW).logits).abs().max() > 1e-3


@torch.no_grad()
def test_encoders():
    """Bidirectional attention, which the op is not asked for, goes to SDPA."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    model = transformers.BertModel(config).double().eval()
    ids, mask = batch("right", (4, 9))
    results = []
    for implementation in ("sdpa", NAME):
        model.set_attn_implementation(implementation)
        results.append((model(ids).last_hidden_state, model(ids, attention_mask=mask).last_hidden_state[mask.bool()]))
    for actual, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "shape, dtype, small",
    [
        ((1, 9, 3, 16, 16), torch.float32, True),
        ((1, 9, 3, 128, 128), torch.float32, False),
        ((1, 9, 3, 1, 1024), torch.float32, True),
        ((1, 32, 8, 1, 4096), torch.float32, False),
        ((8, 12, 12, 1, 4096), torch.float32, True),
        ((8, 12, 12, 1, 4096), torch.bfloat16, False),
        ((1, 9, 3, 16, 16), torch.bfloat16, True),
    ],
)
def test_what_is_small(shape, dtype, small):
    B, H, Hk, S, T = shape
    q, k = torch.empty(B, H, S, 8, dtype=dtype), torch.empty(B, Hk, T, 8, dtype=dtype)
    assert hf_plain.is_small(q, k) == small
    assert hf_plain.is_small(q.to("meta"), k.to("meta"))  # the op is known to be faster on a CPU alone


def test_large_calls_reach_the_op(monkeypatch):
    model = make_model("llama")
    model.set_attn_implementation(NAME)
    calls, original = [], hf_plain.prefix_attention
    monkeypatch.setattr(hf_plain, "prefix_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    model(ROW)
    assert not calls
    model(tokens(4, 100))
    assert len(calls) == len(model.model.layers)


def test_importing_the_module_registers_the_name():
    """In a fresh process, as documented, and from a config."""
    code = (
        "import torch, transformers, ctkernels.tuning.hf\n"
        f"config = transformers.LlamaConfig(**{GROUPED!r})\n"
        "model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='ctkernels')\n"
        "assert model.config._attn_implementation == 'ctkernels'\n"
        "model(torch.tensor([[3, 4, 5]])).logits.sum().backward()\n"
        "assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@torch.no_grad()
def test_compiled(name, side):
    """torch.compile traces a whole model; what a mask says is not known to it, so transformers' masks are used."""
    model = make_model(name, torch.float32)
    ids, mask = batch(side or "left")
    given = {"attention_mask": mask} if side else {}
    with full_precision_softmax():
        expected = model(ids, use_cache=False, **given).logits
    model.set_attn_implementation(NAME)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = compiled(ids, use_cache=False, **given).logits
    torch._dynamo.reset()
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, route):
    """The masks that layers are run again with."""
    forward = padded("left")

    def gradients(model):
        model.requires_grad_(True).zero_grad()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        forward(model).square().mean().backward()
        return model.model.embed_tokens.weight.grad.clone()

    against_stock("mistral", [gradients])


@torch.no_grad()
def test_one_part_of_a_composite_model(route):
    """A dict of implementations: the text decoder under the op, the vision tower as it was."""
    text = {**GROUPED, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision)
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    expected = model(ROW).logits
    model.set_attn_implementation({"text_config": NAME})
    assert model.config.text_config._attn_implementation == NAME
    assert model.config.vision_config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(ROW).logits, expected, rtol=1e-9, atol=1e-9)
