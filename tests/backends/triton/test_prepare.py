"""What the Triton backend launches per layer, with `ctkernels.prepare` and without. Launches are recorded, not run;
`prepared.py` compares bits under the interpreter."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import ctkernels as ct
from ctkernels import dispatch
from ctkernels.backends.triton import backend, launch, table_cache
from ctkernels.backends.triton.config import Target
from ctkernels.problem import Prepared
from ctkernels.testing.models import make_model, tokens
from ctkernels.tuning.adapters.prefix import KVPrefix

from .test_tables import NO_PROBLEM

NAME = "recorded"
LAYERS, ROWS, H, HK, P, D = 3, (9, 16, 4), 4, 2, 1040, 64
FEW, MANY = 1, 132  # multiprocessors: enough work for all of them, or work that is cut into ranges
# Beyond the first layer. FlashAttention-2 has 1 and 3.
FORWARD = {FEW: ["forward"], MANY: ["forward", "merge"]}
BACKWARD = {FEW: ["dq", "own", "prefix"], MANY: ["dq", "own", "prefix", "sum"]}
WORDS = ["words", "tile_words"]
NO_KERNEL = (
    "empty",
    "view",
    "as_strided",
    "detach",
    "transpose",
    "unsqueeze",
    "squeeze",
    "alias",
    "split",
    "slice",
    "t.",
)


@pytest.fixture
def recorded(monkeypatch) -> list[str]:
    """Names of the launches of backend "recorded", which is Triton's, for CPU tensors, but for running anything."""
    names: list[str] = []
    monkeypatch.setitem(dispatch.BACKENDS, NAME, ("ctkernels.backends.triton.backend", ("cpu",)))
    monkeypatch.setattr(launch, "run", lambda launches: names.extend(x.name.removesuffix("_kernel") for x in launches))
    for name in ("unavailable", "refusal"):
        monkeypatch.setattr(backend, name, lambda *args: None)
    monkeypatch.setattr(backend, "current", lambda device: nullcontext())
    monkeypatch.setattr(backend, "target", lambda device: Target("sm_90", FEW))
    monkeypatch.setattr(table_cache, "_recent", [])
    yield names
    dispatch._unavailable.cache_clear()


def on(monkeypatch, multiprocessors: int) -> None:
    monkeypatch.setattr(backend, "target", lambda device: Target("sm_90", multiprocessors))


def in_a_graph(monkeypatch, number: int) -> None:
    monkeypatch.setattr(backend, "order", lambda x: (0, number))


def rows() -> list[Tensor]:
    """q, k, v `[N, heads, D]` of a layer."""
    return [torch.zeros(sum(ROWS), heads, D).bfloat16().requires_grad_() for heads in (H, HK, HK)]


def prefixes() -> list[tuple[Tensor, Tensor]]:
    one = lambda: torch.zeros(HK, P, D).requires_grad_()  # noqa: E731
    return [(one(), one()) for _ in range(LAYERS)]


def a_mask() -> ct.ContextMask:
    return ct.ContextMask(hidden=torch.tensor([[0, 70], [64, 192], [0, 0]]), drop_p=0.2, seed=5)


BOUNDS = torch.tensor([0, *ROWS]).cumsum(0).to(torch.int32)


def step(mask, prefixes, names, bounds: Tensor = BOUNDS, **options) -> tuple[list[list[str]], list[list[str]]]:
    """All layers forward, then all backward: names of the launches of each call."""
    outs, inputs, forward, backward = [], [[*rows(), *prefix] for prefix in prefixes], [], []

    def seen() -> list[str]:
        found = list(names)
        names.clear()
        return found

    for q, k, v, *prefix in inputs:
        outs.append(ct.prefix_attention_varlen(q, k, v, bounds, *prefix, mask, backend=NAME, **options))
        forward.append(seen())
    for out, leaves in zip(reversed(outs), reversed(inputs), strict=True):
        torch.autograd.grad(out, leaves, torch.zeros_like(out))
        backward.append(seen())
    return forward, backward


@pytest.mark.parametrize("graph", [0, 7])
@pytest.mark.parametrize("multiprocessors", [FEW, MANY])
def test_launches_of_prepared_calls(recorded, monkeypatch, multiprocessors, graph):
    """The same in a captured graph as outside of one."""
    on(monkeypatch, multiprocessors)
    in_a_graph(monkeypatch, graph)
    given = prefixes()
    forward, backward = step(ct.prepare(a_mask(), given), given, recorded)
    later = FORWARD[multiprocessors]
    assert len(later) <= 2 and len(BACKWARD[multiprocessors]) <= 4
    # the first layer makes the tables of both directions, with tiles of two sizes for the backward pass
    assert forward == [[*WORDS, *WORDS, "tile_words", *later], *[later] * (LAYERS - 1)]
    assert backward == [BACKWARD[multiprocessors]] * LAYERS


@pytest.mark.parametrize("graph", [0, 7])
def test_launches_of_plain_calls(recorded, monkeypatch, graph):
    """Outside of a graph the set-up of the last calls is recalled; prefixes are rounded by each call."""
    in_a_graph(monkeypatch, graph)
    forward, backward = step(a_mask(), prefixes(), recorded)
    again = [] if graph == 0 else [*WORDS, "tile_words"]
    assert forward == [[*WORDS, "round", "forward"]] + [[*again[:2], "round", "forward"]] * (LAYERS - 1)
    assert backward == [[*WORDS, "tile_words", "round", "dq", "own", "prefix"]] + [
        [*again, "round", "dq", "own", "prefix"]
    ] * (LAYERS - 1)


def test_another_graph_makes_its_own(recorded, monkeypatch):
    mask = ct.prepare(a_mask())
    for number, made in ((1, True), (1, False), (2, True), (0, True)):
        in_a_graph(monkeypatch, number)
        with torch.no_grad():
            ct.prefix_attention_varlen(*rows(), BOUNDS, *prefixes()[0], mask, backend=NAME)
        assert ("words" in recorded) == made, number
        recorded.clear()


def test_recalled_set_ups_are_of_the_very_same_tensors(recorded):
    """One is made for another tensor, even of the same values, and after a write to one."""
    heads, mask = (H, HK, HK), a_mask()
    problem = NO_PROBLEM._replace(hidden=mask.hidden, context_length=P, drop_p=0.2)

    def recalled(problem, S: int = 5, backward: bool = False) -> Tensor:
        own = [torch.zeros(3, n, S, D) for n in heads]
        return backend.recalled((*own, torch.zeros(1, HK, P, D), torch.zeros(1, HK, P, D), None, problem), backward)

    first = recalled(problem)
    assert recalled(problem) is first
    changes = dict(seed=3), dict(drop_p=0.3), dict(context_length=P - 1), dict(hidden=mask.hidden.clone())
    for other in [problem._replace(**change) for change in changes]:
        assert recalled(other) is not first
    assert recalled(problem, S=6) is not first and recalled(problem, backward=True) is not first
    assert recalled(problem) is first
    mask.hidden[1, 1] = 66
    assert recalled(problem) is not first
    with torch.inference_mode():
        frozen = problem._replace(hidden=torch.tensor([[0, 1], [1, 2], [0, 0]]))
        assert recalled(frozen) is not recalled(frozen)  # such a tensor does not count writes


def test_tables_of_another_call_are_refused(recorded):
    inputs = [torch.zeros(3, n, 5, D) for n in (H, HK, HK)] + [torch.zeros(1, HK, P, D)] * 2 + [None]
    problem = NO_PROBLEM._replace(context_length=P, drop_p=0.2)
    tables = backend.tables(*inputs, problem, False)
    with pytest.raises(ValueError, match=r"prepared tables must be int32 \[\d+\]"):
        backend.forward(*inputs, problem, Prepared(forward_tables=tables[1:]))
    with pytest.raises(ValueError, match="prepared prefixes must be"):
        backend.forward(*inputs, problem, Prepared(tables, None, inputs[3][:, :1], inputs[3][:, :1]))


class Kernels(TorchDispatchMode):
    """Names of torch's operators that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not any(word in name for word in NO_KERNEL) and not name.startswith("ctkernels."):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_torch_launches_nothing_beyond_the_first_layer(recorded):
    """Padded rows: nothing is filled first either, and a bias in bf16 is read as it is."""
    inputs = [torch.zeros(3, heads, 5, D).bfloat16() for heads in (H, HK, HK)]
    inputs += [
        torch.zeros(1, HK, P, D).bfloat16(),
        torch.zeros(1, HK, P, D).bfloat16(),
        torch.zeros(1, H, P).bfloat16(),
    ]
    problem = NO_PROBLEM._replace(
        seq_lens=torch.tensor([5, 0, 3]), hidden=a_mask().hidden, context_length=P, drop_p=0.2
    )
    prepared = Prepared(*(backend.tables(*inputs, problem, backward) for backward in (False, True)))
    seen = []
    for given in (prepared, Prepared(), Prepared()):  # the second makes its own, which the third recalls
        with Kernels() as kernels:
            out, lse = backend.forward(*inputs, problem, given)
            backend.backward(out, None, *inputs, out, lse, [True] * 6, problem, given)
        seen.append(kernels.names)
    assert seen[0] == seen[2] == [] and len(seen[1]) > 20


def test_attached_models_prepare_every_forward_pass(recorded):
    model = make_model("llama", torch.bfloat16)
    layers = model.config.num_hidden_layers
    prefix = KVPrefix.from_tokens(model, tokens(12, seed=2), torch.tensor([0, 5, 12]))
    mask = ct.ContextMask.leave_one_out(prefix.segments, torch.tensor([0, 1]), drop_p=0.2)
    bounds = torch.tensor([0, 4, 7], dtype=torch.int32)
    with prefix.attach(model, mask, cu_seqlens=bounds, backend=NAME):
        for _ in range(2):
            recorded.clear()
            model(tokens(1, 7, seed=3)).logits.float().square().mean().backward()
            backward = ["dq", "own", "prefix"] * (layers - 1) + ["delta", "prefix"]  # the first needs no dq, dk, dv
            assert [name for name in recorded if "words" not in name] == ["forward"] * layers + backward
            assert recorded.count("words") == 2
