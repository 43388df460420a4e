"""Scores against the stock model on the concatenated context, and the metrics against their definitions."""

import pytest
import torch
from torch.nn.functional import log_softmax

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, SPACE, char_tokenizer, ids
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import TextFormat, encode_context
from ctkernels.tuning.data.metrics import accuracy, macro_f1
from ctkernels.tuning.evaluation.evaluate import evaluate_prefix
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.tune import tune

TOKENIZER = char_tokenizer()
OPTIONS = ("warm", "ward", "cold", "ok", "o")  # warm and ward share a run; lengths differ
ITEMS = [
    Demonstration("sleet", "cold", OPTIONS, source="test.jsonl:1"),
    Demonstration("a stove", "warm", OPTIONS, source="test.jsonl:2"),
    Demonstration("tea", "ok", OPTIONS, source="test.jsonl:3"),
    Demonstration("a glacier in spring", "o", OPTIONS, source="test.jsonl:4"),
]
CONTEXT = encode_context(TOKENIZER, DEMONSTRATIONS).input_ids


@pytest.fixture(params=["gpt2", "llama"], scope="module")
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def prefix(model):
    return tune(model, TOKENIZER, DEMONSTRATIONS, "icl").prefix


@torch.no_grad()
def stock_loss(model, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """Mean cross-entropy of an answer behind a prompt, from one plain forward pass."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return -log_softmax(logits, dim=-1)[range(len(answer)), list(answer)].mean().item()


@pytest.mark.parametrize("shots", [True, False])
def test_options_are_scored_as_the_stock_model_would(model, prefix, shots):
    if not shots:
        prefix = tune(model, TOKENIZER, DEMONSTRATIONS, "zero-shot").prefix
    result = evaluate_prefix(model, TOKENIZER, ITEMS, prefix)
    losses = []
    for item in ITEMS:
        start = (*CONTEXT.tolist(), SPACE) if shots else ()  # without demonstrations nothing precedes the input
        prompt = start + ids(item.input) + (SPACE,)
        losses.append({option: stock_loss(model, prompt, ids(option)) for option in OPTIONS})
    assert result.predictions == [min(scores, key=scores.get) for scores in losses]
    gold = [scores[item.output] for scores, item in zip(losses, ITEMS, strict=True)]
    assert result.gold_loss == pytest.approx(sum(gold) / len(gold), abs=1e-9)
    outputs = [item.output for item in ITEMS]
    assert result.accuracy == accuracy(result.predictions, outputs)
    assert (result.metric, result.score) == ("macro_f1", macro_f1(result.predictions, outputs))
    assert result.items == 4


def test_batches_and_sharing_do_not_matter(model, prefix):
    whole = evaluate_prefix(model, TOKENIZER, ITEMS, prefix)
    split = evaluate_prefix(model, TOKENIZER, ITEMS, prefix, max_tokens=12)
    assert split.predictions == whole.predictions
    assert split.gold_loss == pytest.approx(whole.gold_loss, abs=1e-12)


def test_options_that_differ_in_their_last_token_share_a_run(model, prefix):
    tokens = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    item = Demonstration("tea", "a", ("a", "b", "c"))
    evaluate_prefix(model, TOKENIZER, [item], prefix)
    handle.remove()
    assert tokens == [len("_tea_")]


def test_generation_equals_greedy_decoding_of_the_stock_model(model, prefix):
    items = [Demonstration(text, "warm") for text in ("ice", "sun", "a stove", "hot tea.")]
    with pytest.MonkeyPatch.context() as patch:  # what a model's own settings add to greedy decoding does not count
        patch.setattr(model.generation_config, "repetition_penalty", 5.0)
        patch.setattr(model.generation_config, "suppress_tokens", list(ids("abcdefgh")))
        own, rows = model.generation_config, []
        generate = model.generate
        patch.setattr(model, "generate", lambda **given: (rows.append(len(given["input_ids"])), generate(**given))[1])
        result = evaluate_prefix(model, TOKENIZER, items, prefix, max_tokens=20, max_new_tokens=6)
        assert model.generation_config is own
    assert rows == [1, 1, 1, 1]  # two of 5 tokens each may grow to 22
    expected = []
    for item in items:
        tokens = [*CONTEXT.tolist(), SPACE, *ids(item.input), SPACE]
        answer = []
        with torch.no_grad():
            for _ in range(6):
                token = model(torch.tensor([tokens + answer])).logits[0, -1].argmax().item()
                if token in (SPACE, TOKENIZER.eos_token_id):
                    break
                answer.append(token)
        expected.append(TOKENIZER.decode(answer, skip_special_tokens=True).strip())
    assert result.predictions == expected
    assert len(set(expected)) > 1  # guards the comparison
    assert (result.metric, result.score) == ("exact_match", 0.0)


def test_generation_stops_at_the_delimiter_and_counts_exact_matches():
    """A model trained to copy the one demonstration's answer, and to stop behind it."""
    model = make_model("llama", torch.float32)
    items = [Demonstration("ab", "cold"), Demonstration("ba", "ok")]
    settings = get_method("ct-kv").settings(epochs=60, lr=0.1, drop_p=0.0, leave_one_out="none", learn_stop=True)
    prefix = tune(model, TOKENIZER, items, settings=settings).prefix
    result = evaluate_prefix(model, TOKENIZER, items, prefix, max_new_tokens=12)
    assert (result.predictions, result.accuracy) == (["cold", "ok"], 1.0)
    wrong = [Demonstration("ab", "cold"), Demonstration("ba", "okay")]
    assert evaluate_prefix(model, TOKENIZER, wrong, prefix, max_new_tokens=12).accuracy == 0.5


def test_evaluation_is_by_options_only_if_every_item_has_some(model, prefix):
    mixed = [ITEMS[0], Demonstration("tea", "ok", source="test.jsonl:9")]
    assert evaluate_prefix(model, TOKENIZER, mixed, prefix, max_new_tokens=2).metric == "exact_match"
    with pytest.raises(DataError, match=r"test\.jsonl:9: no options to choose from; evaluate by generation"):
        evaluate_prefix(model, TOKENIZER, mixed, prefix, by="options")


def test_items_with_their_own_options_are_scored_by_accuracy(model, prefix):
    items = [ITEMS[0], Demonstration("tea", "up", ("up", "down"))]
    result = evaluate_prefix(model, TOKENIZER, items, prefix)
    assert (result.metric, result.score) == ("accuracy", result.accuracy)


def test_the_first_of_equal_options_wins(monkeypatch):
    """All tokens but q are equally likely, so cold and warm are equal, though warm runs first, with warq."""
    model = make_model("llama")
    logits = torch.zeros(61, dtype=torch.float64)
    logits[ids("q")] = -5.0
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: logits.expand(*hidden.shape[:-1], -1))
    prefix = KVPrefix.from_tokens(model, CONTEXT, torch.tensor([0, len(CONTEXT)]))
    for options in (("warq", "cold", "warm"), ("warq", "warm", "cold")):
        item = Demonstration("tea", "cold", options)
        assert evaluate_prefix(model, TOKENIZER, [item], prefix).predictions == [options[1]]


def test_bad_items(model, prefix):
    with pytest.raises(DataError, match="evaluation needs test items, got none"):
        evaluate_prefix(model, TOKENIZER, [], prefix)
    with pytest.raises(ValueError, match="by must be 'options' or 'generation', got 'option'"):
        evaluate_prefix(model, TOKENIZER, ITEMS, prefix, by="option")
    same = Demonstration("tea", "é", ("é", "ü"), source="test.jsonl:4")
    with pytest.raises(DataError, match=r"test\.jsonl:4: the options 'é' and 'ü' are the same tokens"):
        evaluate_prefix(model, TOKENIZER, [same], prefix)
    long = Demonstration("x" * 128, "ok", ("ok", "cold"), source="test.jsonl:5")
    with pytest.raises(DataError, match=r"test\.jsonl:5: a row of \d+ tokens behind a prefix of \d+ exceeds"):
        evaluate_prefix(model, TOKENIZER, [ITEMS[0], long], prefix)
    spaced = Demonstration("tea", "very hot", source="test.jsonl:6")
    with pytest.raises(DataError, match=r"test\.jsonl:6: the output contains the delimiter ' '"):
        evaluate_prefix(model, TOKENIZER, [spaced], prefix)


def test_the_text_format_of_the_tuning_run_is_the_default(model):
    question = TextFormat(delimiter="?")
    prefix = tune(model, TOKENIZER, DEMONSTRATIONS, "icl", text_format=question).prefix
    loss = evaluate_prefix(model, TOKENIZER, ITEMS, prefix).gold_loss
    assert loss == evaluate_prefix(model, TOKENIZER, ITEMS, prefix, text_format=question).gold_loss
    assert loss != evaluate_prefix(model, TOKENIZER, ITEMS, prefix, text_format=TextFormat()).gold_loss


def test_cut_inputs_are_reported(model, prefix):
    with pytest.warns(UserWarning, match=r"1 inputs lost their end .* test\.jsonl:4"):
        evaluate_prefix(model, TOKENIZER, ITEMS, prefix, text_format=TextFormat(max_pair_tokens=20))


def test_prompts_of_generation_are_cut_as_in_training(model, prefix, recwarn):
    """Whatever the answer may grow to; `max_pair_tokens` is less than `max_new_tokens` here."""
    form = TextFormat(max_pair_tokens=12)
    items = [Demonstration("a glacier", "warm"), Demonstration("hut", "ok")]  # 7 of the 9 tokens fit
    result = evaluate_prefix(model, TOKENIZER, items, prefix, text_format=form, max_new_tokens=16)
    cut = [Demonstration("a glaci", "warm"), items[1]]
    assert [str(w.message).partition(" to keep")[0] for w in recwarn] == ["2 inputs lost their end"]  # loss, generation
    assert result.predictions == evaluate_prefix(model, TOKENIZER, cut, prefix, max_new_tokens=16).predictions


def test_the_model_is_left_as_it_was(model, prefix):
    model.train()
    evaluate_prefix(model, TOKENIZER, ITEMS[:1], prefix)
    assert model.training
    assert all(p.grad is None for p in prefix.parameters())
    model.eval()
