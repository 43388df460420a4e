"""Prefixes of another kind: the members that `hf/protocols.py` names are all that attaching and evaluating need."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ctkernels.testing.models import make_model, tokens
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning import KVPrefix, PrefixSet, evaluate_prefix
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.encode import encode_tokens
from ctkernels.tuning.hf.protocols import Origin, PrefixLike, PrefixSetLike

ROWS = tokens(2, 7, seed=3)


def only(protocol: type, thing: object, **instead: object) -> SimpleNamespace:
    """An object with the members of the protocol alone: those of `thing`, or `instead` of them."""
    names = [name for name in vars(protocol) if not name.startswith("_")]
    return SimpleNamespace(**{name: instead.get(name, getattr(thing, name)) for name in names})


def like(prefix: KVPrefix) -> SimpleNamespace:
    return only(PrefixLike, prefix, metadata=only(Origin, prefix.metadata))


@pytest.fixture(scope="module", params=["llama", "bloom"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def prefixes(model) -> list[KVPrefix]:
    return [KVPrefix.from_tokens(model, tokens(n, seed=n), torch.tensor([0, n])) for n in (11, 5)]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_prefix(model, prefixes, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.train()
    results = []
    for prefix in (prefixes[0], like(prefixes[0])):
        prefixes[0].zero_grad()
        with Attachment(prefix, model):
            logits = model(ROWS, use_cache=False).logits
            logits.square().sum().backward()
        results.append([logits, *(p.grad.clone() for p in prefixes[0].parameters())])
    model.eval().gradient_checkpointing_disable()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_context_behind_a_prefix(model, prefixes):
    behind = [encode_tokens(model, ROWS[0], behind=prefix) for prefix in (prefixes[0], like(prefixes[0]))]
    assert all(torch.equal(a, b) for kinds in zip(*behind, strict=True) for a, b in zip(*kinds, strict=True))


@torch.no_grad()
def test_several_prefixes(model, prefixes):
    several = PrefixSet(prefixes)
    alike = only(PrefixSetLike, several, prefixes=[like(prefix) for prefix in prefixes])
    results = []
    for tasks in (several, alike):
        with Attachment(tasks, model, prefix_index=torch.tensor([1, 0])):
            results.append(model(ROWS).logits)
    assert torch.equal(*results)


def test_evaluation(model):
    prefix = KVPrefix.from_demonstrations(model, char_tokenizer(), DEMONSTRATIONS)
    results = [evaluate_prefix(model, char_tokenizer(), DEMONSTRATIONS, each) for each in (prefix, like(prefix))]
    assert results[0] == results[1]
