"""The training step of an attached model under what users put around it: torch.compile, autocast, checkpoints made by
hand or by operator name, deterministic algorithms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ctkernels import ContextMask
from ctkernels.testing.models import make_model, pad_rows, tokens
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.batches import make_batch
from ctkernels.tuning.data.formats import TextFormat, encode_rows
from ctkernels.tuning.train.learners import PrefixLearner
from ctkernels.tuning.train.trainer import TrainingError
from tests.tuning.runs import TOKENIZER, run, settings

CONTEXT, SEGMENTS = tokens(12, seed=7), torch.tensor([0, 5, 12])
FORWARD = torch.ops.ctkernels.prefix_attention.default


def learner(model) -> PrefixLearner:
    prefix = KVPrefix.from_demonstrations(model, TOKENIZER, DEMONSTRATIONS)
    rows = encode_rows(TOKENIZER, DEMONSTRATIONS, TextFormat())
    return PrefixLearner(model, prefix, rows, settings("ct-kv", drop_p=0.3))


def gradients(loss: Tensor, prefix: KVPrefix) -> list[Tensor]:
    prefix.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in prefix.parameters()]


@pytest.mark.parametrize(
    ("name", "changes", "layout", "backend"),
    [
        ("gpt2", {"n_layer": 2}, "packed", "aot_eager"),
        ("llama", {"num_hidden_layers": 2}, "padded", "aot_eager"),
        ("llama", {"num_hidden_layers": 1}, "packed", "inductor"),
    ],
)
def test_compiled_step(name, changes, layout, backend):
    """Model, prefix, leave-one-out, token dropout and loss in one graph, which serves every epoch's seed."""
    torch._dynamo.reset()
    trained = learner(make_model(name, torch.float32, **changes))
    batch = make_batch(trained.rows(0), range(len(DEMONSTRATIONS)), layout)
    counter = CompileCounterWithBackend(backend)

    def step(seed: int) -> Tensor:
        return trained.losses(batch, seed).mean()

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    seen = []
    with trained.attached(None):
        for seed in (1, 2, 2**40 + 1):
            expected, actual = step(seed), compiled(seed)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
            seen.append(float(expected.detach()))
            wanted = gradients(expected, trained.prefix)
            for a, b in zip(gradients(actual, trained.prefix), wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    torch._dynamo.reset()
    assert len(set(seen)) == 3  # the seed matters
    assert counter.frame_count <= 2  # the first seed is a constant, then it is not


def test_compiled_with_left_padding():
    """A graph cannot ask which side the padding is on; it serves both, and refuses what is not padding as it runs."""
    torch._dynamo.reset()
    model = make_model("llama", torch.float32, num_hidden_layers=1)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    mask = ContextMask(hidden=torch.tensor([[0, 5], [5, 12]]))
    with prefix.attach(model, mask=mask):
        for side in ("left", "right"):
            ids, padding = pad_rows([tokens(3), tokens(7)], side)
            expected, actual = (
                forward(ids, attention_mask=padding, use_cache=False).logits[padding.bool()]
                for forward in (model, compiled)
            )
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            wanted = gradients(expected.square().sum(), prefix)
            for a, b in zip(gradients(actual.square().sum(), prefix), wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
        holes = padding.clone()
        holes[1, 2] = 0
        with pytest.raises(RuntimeError, match="must have rows that are one run of ones"):
            compiled(ids, attention_mask=holes, use_cache=False)
    torch._dynamo.reset()
    assert counter.frame_count == 1


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_autocast(layout):
    """bf16 inside, an fp32 prefix and gradient outside, as far from fp32 as the rounding of bf16 takes it."""
    trained = learner(make_model("llama", torch.float32))
    batch = make_batch(trained.rows(0), range(len(DEMONSTRATIONS)), layout)
    with trained.attached(None):
        exact = gradients(trained.losses(batch, 1).sum(), trained.prefix)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = trained.losses(batch, 1)
        assert losses.dtype == torch.float32
        rounded = gradients(losses.sum(), trained.prefix)
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == torch.float32
        assert 0 < (a - b).norm() < 0.15 * b.norm()  # measured: 0.02 to 0.09


class Counter(TorchDispatchMode):
    """Counts calls of the attention operator."""

    calls = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls += operator is FORWARD
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("save", [False, True])
def test_selective_checkpointing_by_name(save):
    """What a policy says is saved is not computed again: 3 layers, with or without a second pass."""
    model = make_model("llama")
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    mask = ContextMask(drop_p=0.3, seed=4)
    with prefix.attach(model, mask=mask):
        expected = gradients(model(tokens(2, 5)).logits.square().sum(), prefix)
    context_fn = partial(create_selective_checkpoint_contexts, [FORWARD] if save else [])
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn})
    model.train()
    with Counter() as counter, prefix.attach(model, mask=mask):
        actual = gradients(model(tokens(2, 5)).logits.square().sum(), prefix)
    assert counter.calls == (3 if save else 6)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def checkpointed_by_hand(monkeypatch, model, reentrant: bool) -> None:
    """Wrap the call of every layer in a checkpoint, as users do without transformers' switch."""
    kind = type(next(m for m in model.modules() if type(m).__name__ in ("LlamaDecoderLayer", "BloomBlock")))
    call = kind.__call__
    monkeypatch.setattr(
        kind,
        "__call__",
        lambda self, hidden, *args, **kwargs: checkpoint(
            lambda hidden: call(self, hidden, *args, **kwargs), hidden, use_reentrant=reentrant
        ),
    )


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("way", ["not reentrant", "reentrant", "reentrant, inputs carry gradients"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_checkpoints_by_hand_keep_the_gradient_or_say_so(monkeypatch, name, way):
    """A reentrant checkpoint whose inputs need no gradient drops that of everything inside; here it may not."""
    model = make_model(name)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    prefix.keys[0].requires_grad_(False)
    prefix.values[0].requires_grad_(False)

    def step() -> list[Tensor]:
        prefix.zero_grad()
        with prefix.attach(model):
            model(tokens(2, 5), use_cache=False).logits.square().sum().backward()
        return [p.grad for p in prefix.parameters() if p.requires_grad]

    expected = step()
    checkpointed_by_hand(monkeypatch, model, way != "not reentrant")
    if way == "reentrant":  # the first layer has nothing to lose, the second has
        with pytest.raises(ValueError, match=r"layer 1 of .* runs in a reentrant checkpoint .* use_reentrant=False"):
            step()
        with torch.no_grad(), prefix.attach(model):
            model(tokens(2, 5), use_cache=False)
        return
    if way == "reentrant, inputs carry gradients":
        model.enable_input_require_grads()
    for a, b in zip(step(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def cut(module, args, output):
    return output.detach() if isinstance(output, Tensor) else (output[0].detach(), *output[1:])


def test_a_gradient_that_is_cut_off_is_noticed():
    """Layers without a derivative, as some of quantised weights are: by the trainer, and by whoever attaches."""
    model = make_model("llama")
    handle = model.model.layers[0].register_forward_hook(cut)
    with pytest.raises(TrainingError, match=r"no gradient reached keys.0, values.0: something in LlamaForCausalLM"):
        run("ct-kv", model)
    handle.remove()
    model.model.layers[2].register_forward_hook(cut)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    with prefix.attach(model):
        with pytest.raises(ValueError, match="no gradient would reach it"):
            model(tokens(2, 5))
        with torch.no_grad():
            model(tokens(2, 5))
    with prefix.requires_grad_(False).attach(model):
        model(tokens(2, 5))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_deterministic_algorithms(layout):
    """Nothing in a step lacks a deterministic implementation, and nothing changes."""
    trained = learner(make_model("llama", torch.float32))
    batch = make_batch(trained.rows(0), range(len(DEMONSTRATIONS)), layout)
    with trained.attached(None):
        expected = gradients(trained.losses(batch, 1).sum(), trained.prefix)
        torch.use_deterministic_algorithms(True)
        try:
            actual = gradients(trained.losses(batch, 1).sum(), trained.prefix)
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
