"""Training an attached model without its prefix is an error at the first step, not a run that changes nothing."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import Trainer

from ctkernels.testing.models import make_model, tokens
from ctkernels.tuning.adapters.prefix_model import PrefixModel
from tests.tuning.adapters.prefix_models import make_prefix, same_bits, values
from tests.tuning.adapters.test_prefix_trainer import trainer

LEFT_OUT = r"\(AdamW\) has no parameter of the prefix that is attached to LlamaForCausalLM, .* Train PrefixModel"
ROW = tokens(2, 5)


@pytest.fixture
def model():
    gc.collect()  # optimisers of other tests
    return make_model("llama", torch.float32)


def backward(model) -> None:
    model(ROW, labels=ROW).loss.backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("frozen", [True, False])
def test_trainer_on_an_attached_model(model, tmp_path, frozen):
    """Frozen weights leave its optimiser empty (a gradient norm of 0 and no more), others would be trained instead."""
    model.requires_grad_(not frozen)
    prefix = make_prefix(model)
    before, weight = values(prefix), model.lm_head.weight.clone()
    with prefix.attach(model):
        run: Trainer = trainer(model, tmp_path)
        with pytest.raises(ValueError, match=LEFT_OUT):
            run.train()
    assert run.state.global_step == 0 and same_bits(values(prefix), before)
    assert torch.equal(model.lm_head.weight, weight)


def test_a_loop_by_hand(model):
    """After the block it is a warning, since the gradient may have been wanted for itself."""
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters())
    prefix = make_prefix(model)
    with prefix.attach(model):
        backward(model)
        with pytest.raises(ValueError, match=LEFT_OUT):
            optimizer.step()
    with pytest.warns(UserWarning, match=LEFT_OUT.replace("is attached", "was attached")):
        optimizer.step()
    with prefix.attach(model):
        backward(model)
        prefix.requires_grad_(False)
        optimizer.step()  # as the message says


def test_a_head_of_ones_own(model):
    """An optimiser of other parameters, while the prefix is attached."""
    head = torch.nn.Linear(61, 2)
    optimizer = torch.optim.AdamW(head.parameters())
    prefix = make_prefix(model)
    with prefix.attach(model):
        head(model(ROW).logits).sum().backward()
        with pytest.raises(ValueError, match=LEFT_OUT):
            optimizer.step()


def test_an_optimiser_of_another_prefix(model):
    """Would catch: `set_adapter` after the optimiser was made."""
    prefixed = PrefixModel(model, {"a": make_prefix(model)})
    optimizer = torch.optim.AdamW(prefixed.parameters())
    backward(prefixed)
    optimizer.step()
    prefixed.add_adapter("b", prefix=make_prefix(make_model("llama", torch.float32)))
    prefixed.set_adapter("b")
    backward(prefixed)
    with pytest.raises(ValueError, match=LEFT_OUT):
        optimizer.step()


@pytest.mark.filterwarnings("error")
def test_what_is_no_mistake(model):
    """Several optimisers; training of something else; gradients that are older than the attachment."""
    prefix = make_prefix(model)
    model.requires_grad_(True)
    of_model, of_prefix = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.optim.AdamW(prefix.parameters())
    with prefix.attach(model):
        for _ in range(2):
            backward(model)
            of_model.step()  # an other one has the prefix
            of_prefix.step()
    del of_prefix
    gc.collect()
    assert prefix.keys[0].grad is not None
    with prefix.attach(model), torch.no_grad():
        teacher = model(ROW).logits
    student = make_model("llama", torch.float32, seed=1).requires_grad_(True)
    other = torch.optim.AdamW(student.parameters())
    with prefix.attach(model):
        (student(ROW).logits - teacher).square().sum().backward()
        other.step()
        backward(model)  # the prefix gets a gradient
    other.step()  # but is no longer attached
    second = make_prefix(model)
    with second.attach(model):  # while the first one still has its gradient
        backward(model)
        torch.optim.AdamW(second.parameters()).step()


def test_a_prefix_of_another_model(model):
    """Training it says nothing of one that waits, attached and with a gradient (a compiled model may keep it alive)."""
    waiting, student = make_prefix(model), make_model("llama", torch.float32, seed=1)
    trained = make_prefix(student)
    with waiting.attach(model), trained.attach(student):
        backward(model)
        backward(student)
        torch.optim.AdamW(trained.parameters()).step()
        with pytest.raises(ValueError, match=LEFT_OUT):
            torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()
