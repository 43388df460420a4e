"""The training loop against the plain PyTorch implementation, and its own promises."""

import math

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ctkernels import ContextMask
from ctkernels.testing import plain_ctkv
from ctkernels.testing.models import full_precision_norm, make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import encode_context, encode_rows
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.tune import tune
from ctkernels.tuning.train.trainer import TrainingError
from tests.tuning.runs import run

TOKENIZER = char_tokenizer()
CT_KV = get_method("ct-kv")
EPOCHS = 4
LR = 1e-2


@pytest.fixture(autouse=True, scope="module")
def precise():
    with full_precision_norm():
        yield


@pytest.fixture(params=["gpt2", "llama"], scope="module")
def model(request):
    return make_model(request.param)


def plain_rows(leave_one_out: str = "self") -> list[plain_ctkv.PlainRow]:
    """The training rows, whole, for the plain implementation."""
    return [
        plain_ctkv.PlainRow(
            row.tokens + row.answers[0][-1:], row.first_label + 1, row.held_out if leave_one_out == "self" else -1
        )
        for row in encode_rows(TOKENIZER, DEMONSTRATIONS)
    ]


def tuned(model, **overrides):
    settings = CT_KV.settings(
        **{"objective": "answers", "epochs": EPOCHS, "lr": LR, "drop_p": 0.3, "seed": 5, **overrides}
    )
    return tune(model, TOKENIZER, DEMONSTRATIONS, "ct-kv", settings)


def parameters(prefix: KVPrefix) -> list[torch.Tensor]:
    return [p.detach() for p in prefix.parameters()]


def assert_same_bits(a: KVPrefix, b: KVPrefix) -> None:
    assert all(torch.equal(x, y) for x, y in zip(parameters(a), parameters(b), strict=True))


def assert_close(a: KVPrefix, b: KVPrefix, tolerance: float = 1e-9) -> None:
    for x, y in zip(parameters(a), parameters(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("leave_one_out", ["self", "none"])
@pytest.mark.parametrize("drop_p", [0.0, 0.3])
def test_equals_the_plain_implementation(model, leave_one_out, drop_p):
    ours = tuned(model, leave_one_out=leave_one_out, drop_p=drop_p)
    context = encode_context(TOKENIZER, DEMONSTRATIONS)
    settings = CT_KV.settings(seed=5)

    def keep(epoch):
        mask = ContextMask(drop_p=drop_p, seed=settings.dropout_seed(epoch))
        return mask.dense(len(DEMONSTRATIONS), len(context.input_ids))

    plain = plain_ctkv.tune(
        model, context.input_ids, context.segments, plain_rows(leave_one_out), epochs=EPOCHS, lr=LR, keep=keep
    )
    assert [r.loss for r in ours.history] == pytest.approx(plain.losses, rel=0, abs=1e-9)
    pairs = zip([*ours.prefix.keys, *ours.prefix.values], [*plain.keys, *plain.values], strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected[0], rtol=0, atol=1e-9)
    # guards the comparison: prefix and loss changed by far more than the tolerance
    start = KVPrefix.from_tokens(model, context.input_ids, context.segments)
    assert (start.keys[0] - ours.prefix.keys[0]).abs().max() > 1e-3
    assert abs(ours.history[-1].loss - ours.history[0].loss) > 1e-2


def test_leave_one_out_and_dropout_change_the_run(model):
    losses = {
        (loo, p): tuned(model, leave_one_out=loo, drop_p=p, epochs=1).history[0].loss
        for loo in ("self", "none")
        for p in (0.0, 0.3)
    }
    assert len({round(loss, 6) for loss in losses.values()}) == 4


def test_padded_rows_train_as_packed_ones(model):
    packed, padded = tuned(model), tuned(model, layout="padded")
    assert_close(packed.prefix, padded.prefix, 1e-10)
    assert [r.loss for r in packed.history] == pytest.approx([r.loss for r in padded.history], rel=1e-12)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_micro_batches_train_as_one_batch(model, layout):
    calls = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    split = tuned(model, layout=layout, max_tokens=20)
    handle.remove()
    assert len(calls) >= 3 * EPOCHS
    assert_close(split.prefix, tuned(model).prefix, 1e-10)


def test_the_loss_is_the_mean_over_rows_of_the_mean_over_answer_tokens(model):
    """Not the mean over all answer tokens: rows with short answers count as much as those with long ones."""
    context = encode_context(TOKENIZER, DEMONSTRATIONS)
    rows = encode_rows(TOKENIZER, DEMONSTRATIONS)
    means, tokens = [], []
    for row in rows:
        shown = torch.ones(len(context.input_ids), dtype=torch.bool)
        keys, values = plain_ctkv.initial_prefix(model, context.input_ids)
        whole = plain_ctkv.PlainRow(row.tokens + row.answers[0][-1:], row.first_label + 1)
        means.append(plain_ctkv.row_losses(model, keys, values, [whole], shown[None]).item())
        tokens.append(len(row.answers[0]))
    loss = tuned(model, leave_one_out="none", drop_p=0.0, epochs=1).history[0].loss
    assert loss == pytest.approx(sum(means) / len(means), abs=1e-10)
    over_tokens = sum(m * n for m, n in zip(means, tokens, strict=True)) / sum(tokens)
    assert abs(loss - over_tokens) > 1e-6  # guards the line above: the two differ here


def test_the_same_seed_gives_the_same_bits(model):
    first, again, other = tuned(model), tuned(model), tuned(model, seed=6)
    assert_same_bits(first.prefix, again.prefix)
    assert [(r.loss, r.grad_norm) for r in first.history] == [(r.loss, r.grad_norm) for r in again.history]
    assert first.history[0].loss != other.history[0].loss


def test_learning_rate_falls_along_a_cosine_from_the_first_step(model):
    history = tuned(model, epochs=8).history
    assert [r.lr for r in history] == pytest.approx([LR * (1 + math.cos(math.pi * e / 8)) / 2 for e in range(8)])
    assert [r.epoch for r in history] == list(range(1, 9))


def test_clipping_bounds_what_the_optimiser_sees(model, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append(math.sqrt(sum(p.grad.pow(2).sum().item() for p in self.param_groups[0]["params"])))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    free = tuned(model, clip_norm=None, epochs=1).history[0].grad_norm
    tuned(model, clip_norm=free / 4, epochs=1)
    assert seen == pytest.approx([free, free / 4], rel=1e-4)


def test_logits_are_computed_where_a_label_is_and_nowhere_else(model):
    sizes = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    tuned(model, epochs=1)
    handle.remove()
    labels = sum(len(d.output) for d in DEMONSTRATIONS)
    assert [tuple(shape[:2]) for shape in sizes] == [(1, labels)]


def test_the_model_is_left_as_it_was():
    model = make_model("llama")
    model.train()
    model.model.layers[0].eval()
    model.model.embed_tokens.requires_grad_(True)
    flags = [p.requires_grad for p in model.parameters()]
    training = [m.training for m in model.modules()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    tuned(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == training
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_model_dropout_is_off_while_tuning(name):
    probability = {"resid_pdrop": 0.5, "embd_pdrop": 0.5} if name == "gpt2" else {}
    model = make_model(name, **probability)
    expected = tuned(model).prefix
    model.train()
    assert_same_bits(tuned(model).prefix, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_activation_checkpointing_is_kept_and_changes_nothing(name):
    model = make_model(name)
    expected = tuned(model).prefix
    model.activation_checkpointing_enable()
    decoder = model.get_decoder()
    layer = decoder.h[0] if name == "gpt2" else decoder.layers[0]
    calls = []
    layer.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    assert_close(tuned(model).prefix, expected, 1e-12)
    assert len(calls) == 1 + 2 * EPOCHS  # for the start, then forward and again before backward in each epoch


def test_low_precision_model_trains_a_full_precision_prefix():
    model = make_model("llama", torch.bfloat16)
    result = tuned(model, drop_p=0.0)
    assert {p.dtype for p in result.prefix.parameters()} == {torch.float32}
    assert result.history[-1].loss < result.history[0].loss
    # steps far below the resolution of bf16 are not lost
    small = tuned(model, lr=1e-6, epochs=1, drop_p=0.0)
    start = tune(model, TOKENIZER, DEMONSTRATIONS, "icl").prefix
    moved = (small.prefix.values[0] - start.values[0]).abs()
    assert 0 < moved.max() < 1e-5


def test_baselines_train_nothing(model):
    zero = tune(model, TOKENIZER, DEMONSTRATIONS, "zero-shot")
    icl = tune(model, TOKENIZER, DEMONSTRATIONS, "icl")
    assert (zero.prefix.length, zero.history, icl.history) == (0, [], [])
    assert icl.prefix.length == len(encode_context(TOKENIZER, DEMONSTRATIONS).input_ids)


def test_the_prefix_says_how_it_was_made(model):
    metadata = tuned(model, lr=0.02).prefix.metadata
    assert (metadata.method, metadata.settings["lr"], metadata.settings["text_format"]["delimiter"]) == (
        "ct-kv",
        0.02,
        " ",
    )
    assert metadata.tokenizer_hash is not None


def test_too_few_demonstrations(model):
    with pytest.raises(DataError, match="ct-kv needs demonstrations, got none"):
        tune(model, TOKENIZER, [])
    with pytest.raises(DataError, match=r"at least two demonstrations, got 1: .* set leave_one_out=.none"):
        tune(model, TOKENIZER, DEMONSTRATIONS[:1])
    single = tune(model, TOKENIZER, DEMONSTRATIONS[:1], settings=CT_KV.settings(epochs=1, leave_one_out="none"))
    assert len(single.history) == 1


def test_a_context_longer_than_the_models_is_refused_before_anything_runs(model):
    def fail(*args):
        raise AssertionError("the model ran")

    handle = model.register_forward_pre_hook(fail)
    base = model.get_decoder().register_forward_pre_hook(fail)
    try:
        with pytest.raises(DataError, match="the demonstrations have 149 tokens, more than the model's context of 128"):
            tune(model, TOKENIZER, [Demonstration("a" * 20, "b" * 8) for _ in range(5)])
        long = [Demonstration("a" * 20, "b" * 8, source=f"train.jsonl:{i}") for i in range(1, 5)]
        with pytest.raises(
            DataError, match=r"train\.jsonl:1: a row of 29 tokens behind a prefix of 119 exceeds .* 128"
        ):
            tune(model, TOKENIZER, long)
    finally:
        handle.remove()
        base.remove()


def test_a_loss_that_is_not_finite_stops_the_run():
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[7, 0] = math.nan
    with pytest.raises(TrainingError, match=r"epoch 1: the loss is nan .* smaller lr than 0\.01"):
        tuned(model)


def test_no_graph_is_kept_behind_the_first_attention(model):
    """Nothing before the first layer's attention needs a gradient: its inputs come from frozen weights alone."""
    seen = {}
    layers = [m for m in model.modules() if isinstance(m, nn.LayerNorm | LlamaRMSNorm)]
    handle = layers[0].register_forward_hook(lambda module, args, out: seen.update(first=out.requires_grad))
    last = layers[-1].register_forward_hook(lambda module, args, out: seen.update(last=out.requires_grad))
    tuned(model, epochs=1)
    handle.remove()
    last.remove()
    assert seen == {"first": False, "last": True}


@pytest.mark.parametrize("method", ["ct-kv", "prompt-tuning"])
def test_offloaded_layers(tmp_path, method):
    """A layer whose weights come when it runs trains as one that is there, with a checkpoint, too."""
    offloaded = make_model("llama")
    cpu_offload(offloaded.model.layers[1], execution_device=torch.device("cpu"))
    result = run(method, offloaded, checkpoint_dir=tmp_path)
    assert_close(result.prefix, run(method, make_model("llama")).prefix)
    with pytest.raises(ValueError, match="ttt trains lora and needs weights in one piece, but those of this LlamaFor"):
        run("ttt", offloaded)
