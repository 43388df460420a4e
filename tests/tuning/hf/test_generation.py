"""generate() with prefixes attached, token for token what the stock model gives on the concatenated contexts.

The stock model gets each row behind its context as one left-padded batch; ours gets the rows alone.
"""

import pytest
import torch
from torch import Tensor

from ctkernels import ContextMask
from ctkernels.testing.models import (
    MODELS,
    full_precision_norm,
    full_precision_softmax,
    make_model,
    pad_rows,
    stock_logits,
    tokens,
)
from ctkernels.tuning import KVPrefix, PrefixSet, left_padded

CONTEXTS = [tokens(n, seed=n) for n in (11, 19, 4)]  # around the windows of the tests' models
ROWS = [tokens(n, seed=3 + n) for n in (4, 9, 1, 6)]
INDEX = torch.tensor([1, 0, 2, 0])
SAMPLING = {"do_sample": True, "temperature": 2.0, "top_k": 40, "top_p": 0.95}
BEAMS = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}


@pytest.fixture(autouse=True, scope="module")
def exact():
    with full_precision_softmax(), full_precision_norm():
        yield


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def tasks(model) -> PrefixSet:
    return PrefixSet([KVPrefix.from_tokens(model, c, torch.tensor([0, len(c)])) for c in CONTEXTS])


def generate(model, ids: Tensor, mask: Tensor, **settings) -> Tensor:
    torch.manual_seed(17)  # of sampling
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


def stock(model, rows: list[Tensor], contexts: list[Tensor], **settings) -> Tensor:
    return generate(
        model, *pad_rows([torch.cat(pair) for pair in zip(contexts, rows, strict=True)], "left"), **settings
    )


@pytest.mark.parametrize("settings", [{}, SAMPLING, BEAMS, {**BEAMS, "do_sample": True}], ids=str)
def test_rows_of_different_prefixes(model, tasks, settings):
    """One batch, three tasks. Windows count keys, and stock batches have padding before their context alone."""
    expected = stock(model, ROWS, [CONTEXTS[i] for i in INDEX], **settings)
    with tasks.attach(model, INDEX):
        assert torch.equal(generate(model, *pad_rows(ROWS, "left"), **settings), expected)


@pytest.mark.parametrize("settings", [{}, SAMPLING, {**BEAMS, "num_return_sequences": 1}], ids=str)
def test_static_caches(model, tasks, settings):
    settings = {**settings, "cache_implementation": "static"}
    expected = stock(model, ROWS, [CONTEXTS[i] for i in INDEX], **settings)
    with tasks.attach(model, INDEX):
        assert torch.equal(generate(model, *pad_rows(ROWS, "left"), **settings), expected)


@pytest.mark.parametrize("settings", [SAMPLING, BEAMS], ids=str)
def test_rows_of_one_prefix(model, tasks, settings):
    expected = stock(model, ROWS, [CONTEXTS[0]] * len(ROWS), **settings)
    with tasks.prefixes[0].attach(model):
        assert torch.equal(generate(model, *pad_rows(ROWS, "left"), **settings), expected)


def test_right_padding(model, tasks):
    """Moved to the left it generates the same; left where it is, generation stops instead of reading padding."""
    expected = stock(model, ROWS, [CONTEXTS[i] for i in INDEX])
    batch = pad_rows(ROWS, "right")
    with tasks.attach(model, INDEX):
        assert torch.equal(generate(model, *left_padded(*batch)), expected)
        with pytest.raises(ValueError, match="rows padded on the right go on behind their padding"):
            generate(model, *batch)


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
@torch.no_grad()
def test_logits(model, tasks, layout):
    expected = [stock_logits(model, CONTEXTS[i], row) for i, row in zip(INDEX, ROWS, strict=True)]
    with tasks.attach(model, INDEX.tolist()) as attachment:
        if layout == "packed":
            attachment.cu_seqlens = torch.tensor([0, *(len(row) for row in ROWS)]).cumsum(0).int()
            actual = list(model(torch.cat(ROWS)[None], use_cache=False).logits[0].split([len(row) for row in ROWS]))
        else:
            ids, mask = pad_rows(ROWS, layout)
            logits = model(ids, attention_mask=mask).logits
            actual = [logits[row][mask[row].bool()] for row in range(len(ROWS))]
    for own, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_index_may_change_and_the_mask_counts():
    model = make_model("llama")
    prefixes = [KVPrefix.from_tokens(model, c, torch.tensor([0, len(c)])) for c in CONTEXTS]
    row = ROWS[0][None]
    expected = {index: stock_logits(model, CONTEXTS[index], ROWS[0]) for index in (0, 2)}
    with PrefixSet(prefixes).attach(model, [0]) as attachment:
        for index, wanted in expected.items():
            attachment.prefix_index = torch.tensor([index])
            torch.testing.assert_close(model(row).logits[0], wanted, rtol=1e-9, atol=1e-9)
        before = model(row).logits
        attachment.mask = ContextMask(hidden=torch.tensor([[2, 4]]))
        assert (model(row).logits - before).abs().max() > 1e-3
        attachment.mask = ContextMask(hidden=torch.tensor([[4, 19]]))  # behind this prefix's end
        torch.testing.assert_close(model(row).logits, before)


def test_refusals():
    model = make_model("llama")
    prefixes = [KVPrefix.from_tokens(model, c, torch.tensor([0, len(c)])) for c in CONTEXTS]
    other = KVPrefix.from_tokens(make_model("llama", intermediate_size=48), CONTEXTS[0], torch.tensor([0, 11]))
    with pytest.raises(ValueError, match="at least one KVPrefix"):
        PrefixSet([])
    with pytest.raises(ValueError, match=r"prefixes\[1\] was made for LlamaForCausalLM"):
        PrefixSet([prefixes[0], other])
    tasks = PrefixSet(prefixes)
    with pytest.raises(ValueError, match="has intermediate_size 48 instead of 40"):
        tasks.attach(make_model("llama", intermediate_size=48), [0])
    rows = torch.stack([ROWS[0]] * 3)
    for index, error, message in (
        ([0, 1], ValueError, "must have an entry for each of 3 rows, got 2"),
        ([0, 1, 3], ValueError, r"must lie in \[0, 3\), got \[0, 1, 3\]"),
        ([0, -1, 1], ValueError, r"must lie in \[0, 3\), got \[0, -1, 1\]"),
        ([0.0, 1.0, 1.0], TypeError, "must be an int32 or int64 tensor"),
    ):
        with tasks.attach(model, torch.tensor(index)), pytest.raises(error, match=message):
            model(rows)
    with (
        prefixes[0].attach(model) as attachment,
        pytest.raises(ValueError, match="prefix_index needs several prefixes"),
    ):
        attachment.prefix_index = torch.tensor([0, 0, 0])
        model(rows)
    learned = make_model("gpt2", n_positions=24)
    short, long = (KVPrefix.from_tokens(learned, c, torch.tensor([0, len(c)])) for c in CONTEXTS[:2])
    with PrefixSet([short, long]).attach(learned, [0, 1]) as attachment:
        with pytest.raises(ValueError, match="rows of 9 own tokens after a prefix of 19 positions need 28 positions"):
            learned(torch.stack([ROWS[1]] * 2))
        attachment.prefix_index = torch.tensor([0, 0])
        learned(torch.stack([ROWS[1]] * 2))
    hole = torch.tensor([[1, 0, 1]])
    with pytest.raises(ValueError, match="one run of ones"):
        left_padded(hole, hole)


def test_left_padded():
    rows = [tokens(3, seed=1), tokens(5, seed=2), tokens(0, seed=3)]
    expected = pad_rows(rows, "left")
    for side in ("right", "left"):
        for actual, wanted in zip(left_padded(*pad_rows(rows, side)), expected, strict=True):
            assert torch.equal(actual, wanted)
