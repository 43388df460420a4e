"""ICL with demonstrations chosen for each input; a prefix or prompt that comes to a new task without training."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import encode_context
from ctkernels.tuning.data.retrieval import InWordsEncoder
from ctkernels.tuning.hf.embeddings import mean_states
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.tune import tune
from tests.tuning.runs import ITEMS, TOKENIZER, run

POOL = [Demonstration(f"{word} tea", "ok") for word in ("warm", "cold", "iced", "green", "black", "white")]


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def encoder(demonstrate, shots=2, seed=0, embed=None, pool=POOL):
    return InWordsEncoder(TOKENIZER, None, pool, shots, demonstrate, seed, embed)


def test_all_demonstrations_in_words_are_icl_in_their_order(model):
    """The context behind which an item is scored is the same text, in the prefix or in the row."""
    words = run("icl-words", model, options={"demonstrate": "fixed", "shown": 5})
    assert words.prefix.length == 1 and words.history == []  # BOS
    order = words.adapter.encoder(TOKENIZER).choose(ITEMS[0])
    assert sorted(d.input for d in order) == sorted(d.input for d in DEMONSTRATIONS)
    icl = tune(model, TOKENIZER, order, "icl").adapter.evaluate(model, TOKENIZER, ITEMS)
    assert words.adapter.evaluate(model, TOKENIZER, ITEMS).gold_loss == pytest.approx(icl.gold_loss, abs=1e-9)


def test_the_nearest_embeddings_are_shown_the_nearest_last(model):
    def embed(sequences):
        return mean_states(model, sequences)

    item = Demonstration("green coffee", "ok")
    chosen = encoder("embedding", 3, embed=embed).choose(item)
    vectors = [mean_states(model, [TOKENIZER(d.input, add_special_tokens=False).input_ids])[0] for d in [item, *POOL]]
    similarity = {
        d.input: cosine_similarity(vectors[0], v, dim=0).item() for d, v in zip(POOL, vectors[1:], strict=True)
    }
    nearest = sorted(similarity, key=similarity.__getitem__)[-3:]
    assert [d.input for d in chosen] == nearest and len(set(similarity.values())) == 6
    assert POOL[0] not in encoder("embedding", 6, embed=embed).choose(POOL[0])
    with pytest.raises(ValueError, match=r'demonstrate="embedding" needs the model whose embeddings are compared'):
        encoder("embedding")
    with pytest.raises(ValueError, match="sequences must hold at least one token each, got an empty one"):
        mean_states(model, [[1], []])


def test_mean_states_are_those_of_the_stock_model_and_leave_it_alone(model):
    tokens = [5, 9, 7, 12]
    with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
    model.train()
    found = mean_states(model, [tokens, tokens[:2]])
    assert model.training and found.shape == (2, states.shape[1])
    torch.testing.assert_close(found[0], states.float().mean(dim=0))
    model.eval()


def test_random_ones_are_of_the_input_and_the_seed():
    items = [Demonstration(f"word {i}", "ok") for i in range(8)]
    draws = [tuple(d.input for d in encoder("random").choose(item)) for item in items]
    assert draws == [tuple(d.input for d in encoder("random").choose(item)) for item in items]
    assert len(set(draws)) > 3  # not the same ones before every input
    assert draws != [tuple(d.input for d in encoder("random", seed=1).choose(item)) for item in items]
    assert all(pair not in encoder("random", 6).choose(pair) for pair in POOL)
    assert {d for draw in draws for d in draw} <= {d.input for d in POOL} and all(len(set(d)) == 2 for d in draws)


@pytest.mark.parametrize("demonstrate", ["similar", "embedding", "random", "fixed"])
@pytest.mark.parametrize("method", ["icl-words", "ipt"])
def test_every_choice_is_evaluated_saved_and_loaded(tmp_path, model, method, demonstrate):
    options = {"demonstrate": demonstrate, "shown": 2} | ({"epochs": 1} if method == "ipt" else {})
    adapter = run(method, model, options=options).adapter
    adapter.save_pretrained(tmp_path)
    scores = adapter.evaluate(model, TOKENIZER, ITEMS)
    assert type(adapter).from_pretrained(tmp_path, model, TOKENIZER).evaluate(model, TOKENIZER, ITEMS) == scores


def test_what_is_too_long_is_named(model):
    long = [Demonstration("a" * 60 + str(i), "b" * 8, source=f"train.jsonl:{i}") for i in range(3)]
    with pytest.raises(DataError, match=r"train\.jsonl:0: a row of .* exceeds the model's context of 128"):
        run("icl-words", model, long, {"shown": 2})
    with pytest.raises(ValueError, match="shown must be at least 1, got 0"):
        get_method("icl-words").settings(shown=0)


@pytest.mark.parametrize("method", ["ct-kv", "ct-prompt"])
def test_transfer_to_a_new_task_without_training(model, method):
    """Another task's prefix or prompt stays as it is, and the new demonstrations are encoded behind it."""
    other = run(method, model, DEMONSTRATIONS[:3]).adapter
    moved = run(method, model, DEMONSTRATIONS[3:], {"epochs": 0}, start_from=other)
    assert moved.history == [] and moved.prefix.num_demonstrations == 2
    length, tokens = other.prefix.length, encode_context(TOKENIZER, DEMONSTRATIONS[3:]).input_ids[1:]
    assert moved.prefix.length == length + len(tokens)
    for a, b in zip(moved.prefix.parameters(), other.prefix.parameters(), strict=True):
        torch.testing.assert_close(a[:, :length], b)
    with other.prefix.attach(model), torch.no_grad():
        expected = model(torch.cat((tokens, torch.tensor([5, 6])))[None]).logits[0, -2:]
    with moved.prefix.attach(model), torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([[5, 6]])).logits[0], expected, rtol=1e-6, atol=1e-6)
    icl = run("icl", model, DEMONSTRATIONS[3:]).adapter.evaluate(model, TOKENIZER, ITEMS)
    assert moved.adapter.evaluate(model, TOKENIZER, ITEMS).gold_loss != icl.gold_loss
