"""Every objective against plain PyTorch in fp64: losses of every epoch and what was trained, for what lies in every
layer (ct-kv), in each row (ct-prompt) and in the weights (ttt)."""

import pytest
import torch
from transformers import DynamicCache

from ctkernels import ContextMask
from ctkernels.testing import plain_ctkv
from ctkernels.testing.models import full_precision_norm, make_model
from ctkernels.testing.tasks import SPACE, char_tokenizer, ids
from ctkernels.tuning.adapters.lora import Lora, lora_targets
from ctkernels.tuning.data import Demonstration
from ctkernels.tuning.data.formats import encode_context
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.tune import tune
from tests.tuning.methods import plain_methods
from tests.tuning.objectives.plain_objectives import PlainChoice, likelihoods_of, row_loss

EPOCHS, SEED, LR = 2, 5, 1e-2
TOLERANCE = 1e-8  # a step of AdamW divides the gradient by its own size, and so rounding by a small one
TOKENIZER = char_tokenizer()
# options of other lengths, that begin alike ("ward"), that the output begins with ("w"), of one token; two right ones
TASK = [
    Demonstration("red brick", "warm", ("warm", "ward", "cold", "w")),
    Demonstration("snow", "cold", ("it is warm", "cold")),
    Demonstration("a fire", "c", ("a", "b", "c"), references=(1,)),
]
FREE = [*TASK[:2], Demonstration("ice", "it is cold")]
K = len(TASK)
CASES = [
    ("answers", "mean", "rows", 0.5, TASK),
    ("answers", "mean", "tokens", 0.5, TASK),
    ("options", "mean", "rows", 0.5, TASK),
    ("options", "sum", "rows", 0.5, TASK),
    ("options", "first-token", "rows", 0.5, None),
    ("mixed", "sum", "rows", 0.3, TASK),
    ("mixed", "mean", "tokens", 0.6, FREE),
]


@pytest.fixture(autouse=True, scope="module")
def precise():
    with full_precision_norm():
        yield


@pytest.fixture(scope="module")
def models():
    return {"gpt2": make_model("gpt2", n_layer=2), "llama": make_model("llama", num_hidden_layers=2)}


@pytest.fixture
def model(models, case):
    return models["gpt2" if case[0]["objective"] == "mixed" else "llama"]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case[:3])))
def case(request):
    objective, score, reduction, mixed, task = request.param
    # their first tokens differ
    task = task or [
        Demonstration(d.input, d.output, tuple(o for o in d.options if o not in ("ward", "w"))) for d in TASK
    ]
    return {"objective": objective, "score": score, "reduction": reduction, "mixed": mixed}, task


def plain_choice(d: Demonstration, before) -> PlainChoice:
    options = d.options or ()
    return PlainChoice(
        before, ids(d.output), [ids(o) for o in options], [i for i, o in enumerate(options) if o in d.right]
    )


def shuffled(epoch: int, batch: int) -> list[list[int]]:
    order = torch.randperm(K, generator=torch.Generator().manual_seed((SEED << 32) | epoch)).tolist()
    return [order[i : i + batch] for i in range(0, K, batch)]


def plain_losses(rows, likelihoods, case) -> torch.Tensor:
    """Loss of each of a step's rows. rows: their choices.  likelihoods: of row number i, (before, continuation)."""
    counts = [sum(len(c.output) for c in choices) for choices in rows]
    mean = sum(counts) / len(counts)
    factors = [n / mean if case["reduction"] == "tokens" else 1.0 for n in counts]
    kept = (case["objective"], case["score"], case["mixed"])
    return torch.stack(
        [
            row_loss(choices, likelihoods(i), *kept, factor)
            for i, (choices, factor) in enumerate(zip(rows, factors, strict=True))
        ]
    )


def check(ours, plain, tensors: dict, start: dict) -> None:
    assert [r.loss for r in ours.history] == pytest.approx(plain.losses, rel=0, abs=TOLERANCE)
    assert tensors.keys() == plain.tensors.keys()
    for name, expected in plain.tensors.items():
        torch.testing.assert_close(tensors[name], expected, rtol=0, atol=TOLERANCE)
    # guards the comparison: all of it moved by far more than the tolerance
    assert all((tensors[name] - start[name]).abs().max() > 1e3 * TOLERANCE for name in tensors)


def test_ct_kv(model, case):
    """Would catch: an option that sees another one, or that does not see its input; a branch without leave-one-out or
    with other dropped tokens than its row; positions that start anew; a form other than the scorer's."""
    options, task = case
    drop_p = 0.3
    settings = get_method("ct-kv").settings(epochs=EPOCHS, lr=LR, drop_p=drop_p, seed=SEED, **options)
    ours = tune(model, TOKENIZER, task, "ct-kv", settings)
    context = encode_context(TOKENIZER, task)
    P = len(context.input_ids)
    keys, values = plain_ctkv.initial_prefix(model, context.input_ids)
    tensors = {f"keys.{i}": x for i, x in enumerate(keys)} | {f"values.{i}": x for i, x in enumerate(values)}
    start = {name: x.detach().clone() for name, x in tensors.items()}

    def losses(epoch, rows):
        visible = ContextMask(drop_p=drop_p, seed=(SEED << 32) | epoch).dense(K, P)
        for i in range(K):
            visible[i, context.segments[i] : context.segments[i + 1]] = False

        def likelihoods(i):
            def of(before, tokens):
                sequence = [*before, *tokens]
                cache = DynamicCache()
                for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
                    cache.update(key, value, layer)
                logits = model(
                    input_ids=torch.tensor([sequence]),
                    attention_mask=plain_ctkv.attention_mask(visible[rows[i]][None], len(sequence), keys[0].dtype),
                    position_ids=torch.arange(P, P + len(sequence))[None],
                    past_key_values=cache,
                ).logits[0]
                return likelihoods_of(logits, sequence, len(tokens))

            return of

        choices = [[plain_choice(task[r], ids(f" {task[r].input} "))] for r in rows]
        return plain_losses(choices, likelihoods, options)

    model.requires_grad_(False)
    plain = plain_methods.optimise(plain_methods.PlainRun(tensors), losses, lambda e: [list(range(K))], EPOCHS, LR)
    trained = {f"{kind}.{i}": x[None] for kind in ("keys", "values") for i, x in enumerate(getattr(ours.prefix, kind))}
    check(ours, plain, {name: x.detach() for name, x in trained.items()}, start)


def test_ct_prompt(model, case):
    """Would catch: a branch that does not see the soft prompt, or its own demonstration in it."""
    options, task = case
    settings = get_method("ct-prompt").settings(epochs=EPOCHS, lr=LR, batch_rows=2, drop_p=0.3, seed=SEED, **options)
    ours = tune(model, TOKENIZER, task, "ct-prompt", settings)
    context = encode_context(TOKENIZER, task)
    C = len(context.input_ids)
    embedding = model.get_input_embeddings()
    start = embedding(context.input_ids).detach().clone()
    prompt = start.clone().requires_grad_()

    def losses(epoch, rows):
        visible = ContextMask(drop_p=0.3, seed=(SEED << 32) | epoch).dense(K, C)
        for i in range(K):
            visible[i, context.segments[i] : context.segments[i + 1]] = False

        def likelihoods(i):
            def of(before, tokens):
                sequence = [*before, *tokens]
                embedded = torch.cat((prompt, embedding(torch.tensor(sequence))))[None]
                size = C + len(sequence)
                sees = torch.ones(size, size, dtype=torch.bool).tril()
                sees[:, :C] &= visible[rows[i]]
                mask = torch.zeros(size, size, dtype=prompt.dtype).masked_fill(~sees, torch.finfo(prompt.dtype).min)
                logits = model(inputs_embeds=embedded, attention_mask=mask[None, None]).logits[0, C:]
                return likelihoods_of(logits, sequence, len(tokens))

            return of

        choices = [[plain_choice(task[r], ids(f" {task[r].input} "))] for r in rows]
        return plain_losses(choices, likelihoods, options)

    model.requires_grad_(False)
    run = plain_methods.PlainRun({"prompt": prompt})
    plain = plain_methods.optimise(run, losses, lambda e: shuffled(e, 2), EPOCHS, LR)
    check(ours, plain, {"prompt": ours.adapter.prompt.embeddings.detach()}, {"prompt": start})


@pytest.mark.parametrize("answers", ["all", "last"])
def test_ttt(model, case, answers):
    """Would catch: a branch that sees what follows its input in the sequence, an option behind the wrong one."""
    options, task = case
    settings = get_method("ttt").settings(
        epochs=EPOCHS, lr=LR, batch_rows=2, seed=SEED, lora_rank=2, lora_alpha=4.0, answers=answers, **options
    )
    lora = Lora(2, 4.0, lora_targets(model), SEED)
    with lora.injected(model) as wrapped:
        lora.capture(wrapped)
    start: dict[str, list] = {}
    for name in sorted(lora.tensors):  # A before B
        start.setdefault(name.removeprefix("base_model.model.").rpartition(".lora_")[0], []).append(lora.tensors[name])
    copied = plain_methods.with_lora(model, start, 4.0 / 2)

    def sequence_choices(epoch, row):
        generator = torch.Generator().manual_seed((SEED << 32) | epoch)
        orders = []
        for last in range(K):
            others = [i for i in range(K) if i != last]
            orders.append([*(others[i] for i in torch.randperm(K - 1, generator=generator).tolist()), last])
        tokens, choices = [], []
        for place, i in enumerate(orders[row]):
            tokens += ([SPACE] if place else []) + [*ids(task[i].input), SPACE]
            if answers == "all" or place == K - 1:
                choices.append(plain_choice(task[i], tuple(tokens)))
            tokens += ids(task[i].output)
        return choices

    def losses(epoch, rows):
        def likelihoods(i):
            def of(before, tokens):
                sequence = [*before, *tokens]
                return likelihoods_of(copied(input_ids=torch.tensor([sequence])).logits[0], sequence, len(tokens))

            return of

        return plain_losses([sequence_choices(epoch, r) for r in rows], likelihoods, options)

    tensors = {name: p for name, p in copied.named_parameters() if name.endswith((".a", ".b"))}
    copied.requires_grad_(False)
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    before = {name: x.detach().clone() for name, x in tensors.items()}
    run = plain_methods.PlainRun(tensors)
    plain = plain_methods.optimise(run, losses, lambda e: shuffled(e, 2), EPOCHS, LR)
    ours = tune(model, TOKENIZER, task, "ttt", settings)
    trained = {
        name.removeprefix("base_model.model.").replace(".lora_A.weight", ".a").replace(".lora_B.weight", ".b"): t
        for name, t in ours.adapter.lora.tensors.items()
    }
    check(ours, plain, trained, before)
