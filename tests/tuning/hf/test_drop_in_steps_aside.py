"""Where attn_implementation="ctkernels" leaves a call to transformers: whatever the op does not compute exactly, at
every length, said once."""

import json

import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from ctkernels.testing.models import GROUPED, make_model, tokens
from ctkernels.tuning.hf import IMPLEMENTATION, plain, stock
from ctkernels.tuning.hf.lazy_mask import LazyMask
from ctkernels.tuning.hf.tiny import shrink
from tools.models import drop_in

quiet = pytest.mark.filterwarnings("ignore:attn_implementation=.ctkernels.")


@pytest.fixture
def every_call(monkeypatch):
    """No call is too small for the op; the calls that reach it are counted."""
    calls, op = [], plain.prefix_attention
    monkeypatch.setattr(plain, "SMALL", dict.fromkeys(plain.SMALL, 0))
    monkeypatch.setattr(plain, "FEW_KEYS", 0)
    monkeypatch.setattr(plain, "prefix_attention", lambda *a, **k: calls.append(1) or op(*a, **k))
    return calls


# What once was computed differently without a word, or from some length on refused -> what serves it
DIFFICULT = {
    "deepseek_v32": ["sdpa"],  # an indexer picks keys, by the mask under the names "eager" and "sdpa" alone
    "glm_moe_dsa": ["sdpa"],
    "axk2": ["sdpa"],
    "minimax_m3_vl_text": ["sdpa"],
    "bigbird_pegasus": ["eager"],  # causal by its mask alone
    "pegasus_x": ["eager"],
    "nllb-moe": ["eager"],
    "phimoe": ["op", "sdpa"],  # a window in its mask alone
    "inkling_text": ["sdpa"],  # a position bias
    "inkling2_text": ["eager"],  # and sinks
    "deepseek_v3": ["op", "sdpa"],  # values narrower than queries
    "gemma4_text": ["sdpa"],  # decides by the name "sdpa" what it cuts off
    "gpt_oss": ["eager"],  # sinks
    "bloom": ["eager"],  # computes attention itself
}
# of the classes that the op serves, in part: what their configurations differ in
SERVED = ("qwen3_moe", "cohere2", "smollm3", "olmo3", "opt (decoder)", "bart", "llama4_text", "gemma3")


@quiet
@pytest.mark.parametrize("kind", [*DIFFICULT, *(kind for kind in SERVED if kind in drop_in.classes())])
def test_class(kind):
    result = drop_in.sweep(kind)
    assert result["verdict"] == "right", result
    assert result["through"] == DIFFICULT.get(kind, ["op", "sdpa"]), result


def test_every_class_is_in_the_table():
    """tools/models/results/drop_in.json has what the sweep over all classes found; a class that came with another
    version of transformers is not in it."""
    classes = json.loads(drop_in.RESULTS.read_text())["classes"]
    assert set(classes) == set(drop_in.classes())
    assert not [kind for kind, result in classes.items() if result["verdict"] in ("wrong", "refused")]
    assert sum(result["verdict"] == "right" for result in classes.values()) >= 210


@quiet
@pytest.mark.parametrize("S", [24, 100, 180, 300])
@pytest.mark.parametrize("kind", ["narrow values", "wide values", "wide heads"])
@torch.no_grad()
def test_length_decides_nothing(kind, S):
    """Values of a dimension of their own, and heads that are too wide for the op: small calls and large ones."""
    if kind == "wide heads":
        config = transformers.LlamaConfig(**{**GROUPED, "head_dim": 520, "max_position_embeddings": 512})
    else:
        config = shrink(transformers.DeepseekV3Config())
        config.v_head_dim = 8 if kind == "narrow values" else 24
        config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    expected = model(tokens(2, S), use_cache=False).logits
    model.set_attn_implementation(IMPLEMENTATION)
    torch.testing.assert_close(model(tokens(2, S), use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_said_once(monkeypatch, every_call, recwarn):
    monkeypatch.setattr(stock, "_WARNED", set())
    model = make_model("llama")
    model.set_attn_implementation(IMPLEMENTATION)
    model(tokens(1, 9))
    assert not recwarn.list
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.warns(
        UserWarning, match=r"LlamaAttention is served by transformers' own sdpa .* \(a mask of its own\)"
    ):
        model(tokens(1, 9), position_ids=packed, use_cache=False)
    model(tokens(1, 9), position_ids=packed, use_cache=False)
    assert not recwarn.list
    handed_back = drop_in.tiny_of("gpt_oss")
    handed_back.set_attn_implementation(IMPLEMENTATION)
    with pytest.warns(UserWarning, match=r"GptOss is served by transformers' own eager .*no SDPA for GptOss"):
        handed_back(tokens(1, 9))
    assert handed_back.config._attn_implementation == "eager"  # no word of ours in it any more


@torch.no_grad()
def test_handed_back_too_late():
    """With a ready-made 4D mask nobody asks for one, and this class decides by the name before it calls attention."""
    model = drop_in.tiny_of("deepseek_v32")
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    expected = model(tokens(1, 9), attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation(IMPLEMENTATION)
    with pytest.raises(ValueError, match=r'passes indices .* call model.set_attn_implementation\("sdpa"\)'):
        model(tokens(1, 9), attention_mask=mask, use_cache=False)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(tokens(1, 9), attention_mask=mask, use_cache=False).logits, expected)


class Attention(nn.Module):
    """What the attention functions look at."""

    def __init__(self, **attributes):
        super().__init__()
        self.num_key_value_groups = 2
        for name, value in attributes.items():
            setattr(self, name, value)


def rows(dtype=torch.float64, S=9, T=9):
    torch.manual_seed(0)
    return (torch.randn(2, h, n, 8, dtype=dtype) for h, n in ((4, S), (2, T), (2, T)))


@quiet
@pytest.mark.parametrize(
    "module, arguments, served",
    [
        ({}, {}, True),
        ({}, {"position_ids": torch.arange(9)[None], "use_cache": True, "output_attentions": False}, True),
        ({"is_causal": True}, {"is_causal": None}, True),
        ({"is_causal": False}, {"is_causal": True}, True),
        ({"is_causal": False}, {}, False),
        ({"is_causal": True}, {"is_causal": False}, False),
        ({}, {"position_bias": torch.linspace(-1, 1, 648).double().view(2, 4, 9, 9)}, False),
        ({}, {"sinks": torch.zeros(4)}, False),
        ({}, {"an_argument_of_next_year": 0}, False),
        ({}, {"output_attentions": True}, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_arguments(module, arguments, served, every_call):
    """Those that the op knows, those without effect, and all others: SDPA gets them as they came."""
    attention = Attention(**module)
    q, k, v = rows()
    actual = plain.drop_in_attention(attention, q, k, v, None, dropout=0.0, scaling=0.3, **arguments)[0]
    sdpa = stock.ALL_ATTENTION_FUNCTIONS["sdpa"]
    torch.testing.assert_close(actual, sdpa(attention, q, k, v, None, dropout=0.0, scaling=0.3, **arguments)[0])
    assert len(every_call) == served


@quiet
@pytest.mark.parametrize("S, T, served", [(1, 9, True), (9, 9, True), (4, 9, False)])
def test_no_mask(S, T, served, every_call):
    """Without a mask SDPA lets one query see all keys, and several the first ones: an empty static cache."""
    attention = Attention()
    q, k, v = rows(S=S, T=T)
    actual = plain.drop_in_attention(attention, q, k, v, None)[0]
    torch.testing.assert_close(actual, stock.ALL_ATTENTION_FUNCTIONS["sdpa"](attention, q, k, v, None)[0])
    assert len(every_call) == served


@quiet
def test_softcap_that_sdpa_lacks(every_call):
    """The op has it; where SDPA is to serve a call, it refuses as ever, and so does a missing eager attention."""
    q, k, v = rows()
    plain.drop_in_attention(Attention(), q, k, v, None, softcap=2.0)
    assert every_call
    with pytest.raises(ValueError, match="`sdpa` attention does not support `softcap`"):
        plain.drop_in_attention(Attention(), q, k, v, None, softcap=2.0, dropout=0.1)
    with pytest.raises(ValueError, match=r'Attention: this call needs eager .*attn_implementation="eager"'):
        attention = Attention(config=transformers.Gemma2Config())
        plain.drop_in_attention(attention, q, k, v, None, softcap=2.0, dropout=0.1)


@pytest.mark.parametrize(
    "rule, known",
    [
        (causal_mask_function, (True, None)),
        (sliding_window_causal_mask_function(5), (True, 5)),
        (chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.int64)), (False, None)),
        (bidirectional_mask_function, (False, None)),
        (and_masks(causal_mask_function, sliding_window_causal_mask_function(5)), (False, None)),
        (or_masks(causal_mask_function, bidirectional_mask_function), (False, None)),
        (lambda b, h, q, k: k <= q, (False, None)),
    ],
)
def test_rules_are_told_by_what_they_are_made_of(rule, known):
    assert plain.causal_rule(rule) == known


def lazy(model_type="llama", S=9, **settings):
    config = transformers.CONFIG_MAPPING[model_type](**{**GROUPED, **settings})
    config._attn_implementation = IMPLEMENTATION
    make = create_sliding_window_causal_mask if settings.get("sliding_window") else create_causal_mask
    mask = torch.ones(2, S, dtype=torch.int64)
    mask[0, :2] = mask[1, 3] = 0
    return make(config, torch.zeros(2, S, 32), mask, None), mask.bool()


@quiet
def test_a_mask_that_a_model_works_on(every_call):
    """It is transformers' mask for everybody but the op; once it was shown, for the op, too: it may have changed."""
    mask, valid = lazy()
    expected = sdpa_mask(2, 9, 9, attention_mask=valid)
    assert isinstance(mask, LazyMask) and mask.shape == expected.shape and mask.dtype == torch.bool
    assert isinstance(mask.detach(), LazyMask) and mask.to("cpu") is mask and not mask.rule.shown
    for operation in (
        lambda x: x[:, :, 3:],
        lambda x: ~x,
        lambda x: torch.where(x, 0.0, 1.0),
        lambda x: torch.nn.functional.scaled_dot_product_attention(*torch.eye(9).expand(3, 2, 1, 9, 9), x),
    ):
        assert torch.equal(operation(mask), operation(expected))
    assert mask.rule.shown
    mask, _ = lazy()
    q, k, v = rows()
    attention = Attention()
    mask[:, :, :, 5].fill_(False)
    expected[:, :, :, 5] = False
    actual = plain.drop_in_attention(attention, q, k, v, mask)[0]
    torch.testing.assert_close(actual, stock.ALL_ATTENTION_FUNCTIONS["sdpa"](attention, q, k, v, expected)[0])
    assert not every_call


def test_masks_of_eager_attention_are_added():
    mask, valid = lazy("gemma2")
    expected = sdpa_mask(2, 9, 9, attention_mask=valid, allow_is_causal_skip=False)
    assert mask.dtype == torch.float32
    assert torch.equal((mask + 0) == 0, expected)


def test_what_transformers_would_run():
    assert stock.stock_of(transformers.LlamaConfig) == stock.Stock("sdpa")
    assert stock.stock_of(transformers.Gemma2Config) == stock.Stock("eager")
    assert stock.stock_of(transformers.PegasusXConfig).name == "eager"
    assert "something else" in stock.stock_of(transformers.DeepseekV32Config).why

    class OwnConfig(transformers.PreTrainedConfig):
        model_type = "own"

    class OwnModel(transformers.PreTrainedModel):
        config_class = OwnConfig

    assert stock.stock_of(OwnConfig).name == "eager"  # as transformers sees a class that does not say that it has SDPA
    unreadable = type("Unreadable", (nn.Module,), {"__module__": "nowhere"})
    assert stock.decides_by_name(unreadable) and not stock.decides_by_name(transformers.LlamaForCausalLM)
