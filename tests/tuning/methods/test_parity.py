"""Every training method against an independent plain PyTorch implementation, in fp64, step by step.

ct-kv itself: `test_trainer.py`.
"""

import pytest
import torch

from ctkernels import ContextMask
from ctkernels.testing import plain_ctkv
from ctkernels.testing.models import full_precision_norm, make_model
from ctkernels.testing.tasks import BOS, DEMONSTRATIONS, SPACE, char_tokenizer, ids
from ctkernels.tuning.adapters.lora import Lora, lora_targets
from ctkernels.tuning.data.formats import encode_context
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.tune import tune
from tests.tuning.methods import plain_methods

EPOCHS, SEED = 3, 5
TOLERANCE = 1e-9
K = len(DEMONSTRATIONS)


@pytest.fixture(autouse=True, scope="module")
def precise():
    with full_precision_norm():
        yield


@pytest.fixture(params=["gpt2", "llama"], scope="module")
def model(request):
    return make_model(request.param)


@pytest.fixture(params=[False, True], ids=["plain", "bos"], scope="module")
def tokenizer(request):
    return char_tokenizer(adds_bos=request.param)


def start_of(tokenizer) -> list[int]:
    return [BOS] if len(tokenizer("a").input_ids) == 2 else []


def rows_in_full() -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """`_ x _ y` of each demonstration, and the indices of y."""
    sequences = [ids(f" {d.input} {d.output}") for d in DEMONSTRATIONS]
    labelled = [list(range(len(s) - len(d.output), len(s))) for s, d in zip(sequences, DEMONSTRATIONS, strict=True)]
    return sequences, labelled


def shuffled(epoch: int, batch: int) -> list[list[int]]:
    """Batches of a random order, as the documentation of the settings promises: drawn from the epoch's seed."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed((SEED << 32) | epoch)).tolist()
    return [order[i : i + batch] for i in range(0, K, batch)]


def check(ours, plain, tensors: dict, start: dict) -> None:
    assert [r.loss for r in ours.history] == pytest.approx(plain.losses, rel=0, abs=TOLERANCE)
    for name, expected in plain.tensors.items():
        torch.testing.assert_close(tensors[name], expected, rtol=0, atol=TOLERANCE)
        # guards the comparison: it moved by far more than the tolerance
        assert (tensors[name] - start[name]).abs().max() > 1e3 * TOLERANCE
    assert abs(ours.history[-1].loss - ours.history[0].loss) > 1e-3


@pytest.mark.parametrize(("batch", "drop_p", "layout"), [(4, 0.0, "packed"), (2, 0.3, "packed"), (4, 0.3, "padded")])
def test_ct_prompt(model, tokenizer, batch, drop_p, layout):
    """Would catch: a demonstration hidden from the row's tokens alone, one step per epoch, positions of rows that do
    not start behind the prompt, a schedule that counts epochs."""
    settings = get_method("ct-prompt").settings(
        epochs=EPOCHS, lr=1e-2, batch_rows=batch, drop_p=drop_p, seed=SEED, layout=layout, objective="answers"
    )
    ours = tune(model, tokenizer, DEMONSTRATIONS, "ct-prompt", settings)
    context = encode_context(tokenizer, DEMONSTRATIONS)

    def visible(epoch):
        dropout = ContextMask(drop_p=drop_p, seed=(SEED << 32) | epoch).dense(K, len(context.input_ids))
        for i in range(K):
            dropout[i, context.segments[i] : context.segments[i + 1]] = False
        return dropout

    sequences, labelled = rows_in_full()
    plain = plain_methods.ct_prompt(
        model, context.input_ids, visible, sequences, labelled, lambda e: shuffled(e, batch), EPOCHS, 1e-2
    )
    start = model.get_input_embeddings()(context.input_ids)
    check(ours, plain, {"prompt": ours.adapter.prompt.embeddings}, {"prompt": start})
    # what is evaluated is what was trained: the prompt's own keys and values
    cache = model(inputs_embeds=plain.tensors["prompt"][None], use_cache=True).past_key_values
    for key, layer in zip(ours.prefix.keys, cache.layers, strict=True):
        torch.testing.assert_close(key, layer.keys[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("drop_p", [0.0, 0.3])
def test_prefix_tuning(model, tokenizer, drop_p):
    """Would catch: rows that hide a part of the prefix, or that do not start behind it."""
    settings = get_method("prefix-tuning").settings(
        epochs=EPOCHS, lr=1e-2, prompt_tokens=7, start="first-ids", drop_p=drop_p, seed=SEED, objective="answers"
    )
    ours = tune(model, tokenizer, DEMONSTRATIONS, "prefix-tuning", settings)
    tokens = torch.tensor([*start_of(tokenizer), *range(7)])
    sequences, labelled = rows_in_full()
    rows = [plain_ctkv.PlainRow(s, where[0]) for s, where in zip(sequences, labelled, strict=True)]

    def keep(epoch):
        return ContextMask(drop_p=drop_p, seed=(SEED << 32) | epoch).dense(K, len(tokens))

    plain = plain_ctkv.tune(model, tokens, torch.tensor([0]), rows, epochs=EPOCHS, lr=1e-2, keep=keep)
    start = plain_ctkv.initial_prefix(model, tokens)
    trained = plain_methods.PlainRun({}, plain.losses)
    actual, before = {}, {}
    for kind in ("keys", "values"):
        for i, expected in enumerate(getattr(plain, kind)):
            trained.tensors[f"{kind}{i}"] = expected[0].detach()
            actual[f"{kind}{i}"] = getattr(ours.prefix, kind)[i]
            before[f"{kind}{i}"] = start[kind == "values"][i][0]
    check(ours, trained, actual, before)


def in_context(order: list[int], start: list[int], answers: str) -> tuple[list[int], list[int]]:
    """`x _ y _ x _ y` in that order, and the indices of all answers' tokens, or the last one's."""
    tokens, labelled = list(start), []
    for place, i in enumerate(order):
        d = DEMONSTRATIONS[i]
        tokens += ([SPACE] if place else []) + [*ids(d.input), SPACE]
        if answers == "all" or place == len(order) - 1:
            labelled += range(len(tokens), len(tokens) + len(d.output))
        tokens += ids(d.output)
    return tokens, labelled


def orders(epoch: int) -> list[list[int]]:
    """Order i of an epoch: the others at random, then i."""
    generator = torch.Generator().manual_seed((SEED << 32) | epoch)
    drawn = []
    for last in range(K):
        others = [i for i in range(K) if i != last]
        drawn.append([*(others[i] for i in torch.randperm(K - 1, generator=generator).tolist()), last])
    return drawn


@pytest.mark.parametrize(("answers", "batch"), [("all", 2), ("last", None)])
def test_ttt(model, tokenizer, answers, batch):
    """Would catch: labels at the wrong tokens, a loss over the answers' means instead of their tokens, orders that are
    not drawn anew, a scale other than alpha / rank, an update of other modules."""
    settings = get_method("ttt").settings(
        epochs=EPOCHS,
        lr=1e-2,
        batch_rows=batch,
        seed=SEED,
        lora_rank=3,
        lora_alpha=6.0,
        answers=answers,
        objective="answers",
    )
    lora = Lora(3, 6.0, lora_targets(model), SEED)
    with lora.injected(model) as wrapped:
        lora.capture(wrapped)
    start: dict[str, list] = {}
    for name in sorted(lora.tensors):  # A before B
        path = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        start.setdefault(path, []).append(lora.tensors[name])
    copied = plain_methods.with_lora(model, start, 6.0 / 3)

    def sequences(epoch):
        rows = [in_context(order, start_of(tokenizer), answers) for order in orders(epoch)]
        return [row[0] for row in rows], [row[1] for row in rows]

    def steps(epoch):
        return shuffled(epoch, batch) if batch else [list(range(K))]

    plain = plain_methods.ttt(copied, sequences, steps, EPOCHS, 1e-2)
    ours = tune(model, tokenizer, DEMONSTRATIONS, "ttt", settings)
    trained = {
        name.removeprefix("base_model.model.").replace(".lora_A.weight", ".a").replace(".lora_B.weight", ".b"): t
        for name, t in ours.adapter.lora.tensors.items()
    }
    before = {f"{path}.{kind}": pair[i] for path, pair in start.items() for i, kind in enumerate("ab")}
    assert trained.keys() == plain.tensors.keys() and len(trained) > 0
    check(ours, plain, trained, before)
    # the demonstrations are encoded under the updated weights
    context = encode_context(tokenizer, DEMONSTRATIONS).input_ids
    with torch.no_grad():
        cache = copied(input_ids=context[None], use_cache=True).past_key_values
    for value, layer in zip(ours.prefix.values, cache.layers, strict=True):
        torch.testing.assert_close(value, layer.values[0], rtol=0, atol=1e-8)


def test_ttt_then_ct_kv_is_ct_kv_under_merged_weights(model, tokenizer):
    """Would catch: a prefix encoded or trained under the model's own weights, an update that was not merged."""
    common = {"lora_rank": 3, "seed": SEED, "epochs": EPOCHS, "lr": 1e-2}
    settings = get_method("ttt+ct-kv").settings(**common, ttt_epochs=2, ttt_lr=2e-2, drop_p=0.3)
    both = tune(model, tokenizer, DEMONSTRATIONS, "ttt+ct-kv", settings)
    first = get_method("ttt").settings(**{**common, "epochs": 2, "lr": 2e-2})
    ttt = tune(model, tokenizer, DEMONSTRATIONS, "ttt", first)
    assert [r.loss for r in both.history[:2]] == [r.loss for r in ttt.history]
    assert [r.stage for r in both.history] == ["ttt"] * 2 + [""] * EPOCHS
    with ttt.adapter.lora.merged(model):
        second = get_method("ct-kv").settings(epochs=EPOCHS, lr=1e-2, drop_p=0.3, seed=SEED)
        expected = tune(model, tokenizer, DEMONSTRATIONS, "ct-kv", second)
    plain = tune(model, tokenizer, DEMONSTRATIONS, "ct-kv", second)
    assert [r.loss for r in both.history[2:]] == [r.loss for r in expected.history]
    assert all(torch.equal(a, b) for a, b in zip(both.prefix.parameters(), expected.prefix.parameters(), strict=True))
    assert abs(plain.history[0].loss - expected.history[0].loss) > 1e-3
