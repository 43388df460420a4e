"""Options of ct-kv and prefix tuning: what is trained, what stays, and what pulls it back."""

import math
from copy import deepcopy

import pytest
import torch

from ctkernels.testing import plain_ctkv
from ctkernels.testing.models import make_model, stock_masked_logits
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.batches import make_batch
from ctkernels.tuning.data.formats import encode_context, encode_rows
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.tune import TuneResult, tune
from ctkernels.tuning.train.learners import PrefixLearner
from ctkernels.tuning.train.reparametrise import Network, NetworkPrefix

TOKENIZER = char_tokenizer(adds_bos=True)
P = len(encode_context(TOKENIZER, DEMONSTRATIONS).input_ids)
LAYERS = 3


@pytest.fixture(params=["llama", "bloom"], scope="module")
def model(request):
    return make_model(request.param)


def tuned(model, epochs=2, method="ct-kv", **options) -> TuneResult:
    settings = get_method(method).settings(**{"epochs": epochs, "lr": 1e-2, "seed": 3, **options})
    return tune(model, TOKENIZER, DEMONSTRATIONS, method, settings)


def moved(result: TuneResult, start: TuneResult) -> dict[str, torch.Tensor]:
    """How far each token of each layer's keys and values is from the start, [layers, P]."""
    return {
        kind: torch.stack(
            [
                (a - b).detach().abs().amax(dim=(0, 2))
                for a, b in zip(getattr(result.prefix, kind), getattr(start.prefix, kind), strict=True)
            ]
        )
        for kind in ("keys", "values")
    }


@pytest.fixture(scope="module")
def start(model) -> TuneResult:
    return tune(model, TOKENIZER, DEMONSTRATIONS, "icl")


def test_keys_or_values_alone(model, start):
    for trained, other in (("keys", "values"), ("values", "keys")):
        changes = moved(tuned(model, trained=trained), start)
        assert (changes[trained] > 0).any(dim=1).all() and (changes[other] == 0).all()


def test_top_layers_alone(model, start):
    for count in (1, 2, 3):
        for change in moved(tuned(model, top_layers=count), start).values():
            assert (change[: LAYERS - count] == 0).all() and (change[LAYERS - count :] > 0).any(dim=1).all()
    with pytest.raises(ValueError, match="top_layers must be at most the model's 3 layers, got 4"):
        tuned(model, top_layers=4)


@pytest.mark.parametrize("how", [{}, {"rank": 2}, {"mlp_width": 8}], ids=["itself", "low rank", "network"])
def test_first_tokens_stay(model, start, how):
    for change in moved(tuned(model, frozen_tokens=9, **how), start).values():
        assert (change[:, :9] == 0).all() and (change[:, 9:] > 0).all()
    with pytest.raises(ValueError, match=f"frozen_tokens must be less than the prefix's {P} tokens, got {P}"):
        tuned(model, frozen_tokens=P)


@pytest.mark.parametrize("how", [{"rank": 2}, {"mlp_width": 8}], ids=["low rank", "network"])
def test_updates_start_at_the_start_and_learn(model, start, how):
    result, whole = tuned(model, epochs=15, **how), tuned(model, epochs=1)
    assert result.history[0].loss == pytest.approx(whole.history[0].loss, abs=1e-12)
    assert result.history[-1].loss < result.history[0].loss
    assert all(p.requires_grad for p in result.prefix.parameters())
    # the prefix that is left is the one that was trained: its loss is that of the next step
    longer = tuned(model, epochs=15, drop_p=0.0, **how)
    assert longer.history[0].loss != result.history[0].loss


def test_the_network_runs_once_for_all_layers(model, start, monkeypatch):
    calls, hidden = [], Network.hidden
    monkeypatch.setattr(Network, "hidden", lambda self: calls.append(1) or hidden(self))
    trained = {(kind, layer): True for kind in ("keys", "values") for layer in range(3)}
    written = NetworkPrefix(deepcopy(start.prefix), trained, mlp_width=8, frozen=0, seed=0)
    assert len(written.keys) == 3 and len(calls) == 1


def test_rank_of_the_update(model, start):
    result = tuned(model, epochs=3, rank=2)
    for kind in ("keys", "values"):
        for a, b in zip(getattr(result.prefix, kind), getattr(start.prefix, kind), strict=True):
            update = (a - b).detach().transpose(0, 1).flatten(1)  # [P, Hk * D]
            assert torch.linalg.matrix_rank(update, rtol=1e-9) == 2
    full = (tuned(model, epochs=3).prefix.keys[0] - start.prefix.keys[0]).detach().transpose(0, 1).flatten(1)
    assert torch.linalg.matrix_rank(full, rtol=1e-9) > 2


def test_options_that_make_no_sense_together():
    with pytest.raises(ValueError, match="rank and mlp_width exclude each other"):
        get_method("ct-kv").settings(rank=2, mlp_width=8)
    with pytest.raises(ValueError, match="fisher weighs the pull towards the start, which is 0"):
        get_method("ct-kv").settings(fisher=True)
    for how in ({"rank": 2}, {"mlp_width": 8}):
        with pytest.raises(ValueError, match="fisher needs the prefix itself to be trained"):
            get_method("ct-kv").settings(fisher=True, pull=0.1, **how)


def distance(result: TuneResult, start: TuneResult) -> float:
    pairs = zip(result.prefix.parameters(), start.prefix.parameters(), strict=True)
    return math.sqrt(sum((a - b).detach().pow(2).sum().item() for a, b in pairs))


@pytest.mark.parametrize("how", [{}, {"rank": 2}], ids=["itself", "low rank"])
def test_pull_keeps_it_near_the_start(model, start, how):
    distances = [distance(tuned(model, epochs=12, pull=pull, **how), start) for pull in (0.0, 1e-2, 1.0)]
    assert distances[0] > 1.05 * distances[1] > 1.05**2 * distances[2] > 0


def test_gradient_of_the_pull():
    """One step of the optimiser sees the loss's gradient and pull * weight * (prefix - start)."""
    model = make_model("llama")
    start = tune(model, TOKENIZER, DEMONSTRATIONS, "icl")
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        return step(self, *args, **kwargs)

    def gradients(**options):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", spy)
            result = tuned(model, epochs=2, clip_norm=None, drop_p=0.0, **options)
        return result, [list(g) for g in seen]

    # the penalty is zero at the first step, so that the second one starts from the same prefix
    _, plain = gradients()
    result, pulled = gradients(pull=0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], pulled[0], strict=True))
    first = tuned(model, epochs=2, clip_norm=None, drop_p=0.0)
    assert first.history[1].loss == result.history[1].loss  # the record has the loss without the penalty
    after_one = [p.detach() for p in one_step(model)]
    for a, b, now, begin in zip(plain[1], pulled[1], after_one, start.prefix.parameters(), strict=True):
        torch.testing.assert_close(b - a, 0.5 * (now - begin.detach()), rtol=1e-6, atol=1e-12)
    # Fisher weights: the mean over rows of the squared gradient of the row's loss, over its mean over all entries
    _, weighted = gradients(pull=0.5, fisher=True)
    weights = [(b - a) / (0.5 * (now - begin.detach())) for a, b, now, begin in zip(
        plain[1], weighted[1], after_one, start.prefix.parameters(), strict=True)]  # fmt: skip
    rows = [torch.zeros_like(w) for w in weights]
    for i in range(len(DEMONSTRATIONS)):
        for total, gradient in zip(rows, row_gradient(model, i), strict=True):
            total += gradient.square()
    mean = sum(r.sum() for r in rows) / sum(r.numel() for r in rows)
    for weight, row in zip(weights, rows, strict=True):
        moving = row > 1e-4 * mean  # elsewhere the quotient above is 0 / 0
        torch.testing.assert_close(weight[moving], (row / mean)[moving], rtol=1e-4, atol=1e-6)


def test_fisher_weights_do_not_depend_on_token_dropout(model):
    rows = encode_rows(TOKENIZER, DEMONSTRATIONS)
    penalties = []
    for drop_p in (0.0, 0.5):
        prefix = KVPrefix.from_demonstrations(model, TOKENIZER, DEMONSTRATIONS)
        settings = get_method("ct-kv").settings(pull=0.5, fisher=True, drop_p=drop_p)
        learner = PrefixLearner(model, prefix, rows, settings)
        with learner.attached(None):
            learner.before_training(make_batch(rows, [i]) for i in range(len(rows)))
        with torch.no_grad():
            for number, parameter in enumerate(prefix.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        penalties.append(learner.penalty().item())
    assert penalties[0] == penalties[1] > 0


def one_step(model) -> list[torch.Tensor]:
    """The prefix after the first of two epochs."""
    taken = []

    def on_epoch(record, prefix):
        if record.epoch == 1:
            taken.extend(p.detach().clone() for p in prefix.parameters())

    settings = get_method("ct-kv").settings(epochs=2, lr=1e-2, seed=3, clip_norm=None, drop_p=0.0)
    tune(model, TOKENIZER, DEMONSTRATIONS, "ct-kv", settings, on_epoch=on_epoch)
    return taken


def row_gradient(model, index: int) -> list[torch.Tensor]:
    """Gradient of one row's loss at the start, its own demonstration hidden, through the stock model."""
    context = encode_context(TOKENIZER, DEMONSTRATIONS)
    keys, values = plain_ctkv.initial_prefix(model, context.input_ids)
    row = encode_rows(TOKENIZER, DEMONSTRATIONS)[index]
    shown = torch.ones(1, P, dtype=torch.bool)
    shown[0, context.segments[index] : context.segments[index + 1]] = False
    prefix = [k[0].detach().requires_grad_() for k in keys], [v[0].detach().requires_grad_() for v in values]
    logits = stock_masked_logits(model, *prefix, shown, torch.tensor([row.tokens]))
    labels = torch.tensor(row.answers[0])
    loss = torch.nn.functional.cross_entropy(logits[0, row.first_label :], labels)
    return list(torch.autograd.grad(loss, [*prefix[0], *prefix[1]]))


@pytest.mark.parametrize("method", ["ct-kv", "prefix-tuning"])
def test_steps_of_some_rows(model, method):
    """Would catch: rows that are left out or seen twice in an epoch, an order that never changes."""
    orders: list[list[int]] = []
    forward = PrefixLearner.forward

    def spy(self, batch, seed):
        orders.append(batch.row_ids.tolist())
        return forward(self, batch, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixLearner, "forward", spy)
        tuned(model, epochs=3, method=method, batch_rows=2)
    assert [len(o) for o in orders] == [2, 2, 1] * 3
    epochs = [[i for step in orders[at : at + 3] for i in step] for at in (0, 3, 6)]
    assert all(sorted(order) == list(range(5)) for order in epochs) and len({tuple(o) for o in epochs}) > 1
