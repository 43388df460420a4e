"""PrefixModel under the real `transformers.Trainer`, accelerate and DistributedDataParallel, beside loops by hand."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors import safe_open
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.functional import log_softmax
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning.adapters.prefix_model import PrefixModel
from ctkernels.tuning.methods.tune import tune
from tests.tuning.adapters.prefix_models import (
    COLLATE,
    batch,
    close,
    make_prefix,
    prefix_model,
    rows,
    same_bits,
    values,
)
from tests.tuning.runs import TOKENIZER, settings

LR = 1e-2
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]


def trainer(model, out, kind=Trainer, **options) -> Trainer:
    """Of five epochs on all demonstrations, unless `options` say other."""
    defaults = {
        "per_device_train_batch_size": len(DEMONSTRATIONS),
        "num_train_epochs": 5,
        "learning_rate": LR,
        "optim": "adamw_torch",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    data = Dataset.from_list([{**row, "not an argument": 0} for row in rows()])
    arguments = TrainingArguments(str(out), **{**defaults, **options})
    return kind(model, arguments, train_dataset=data, eval_dataset=data, data_collator=COLLATE)


def step_by_hand(model, optimizer, *batches) -> float:
    """One step on the mean loss of all answer tokens, as Trainer takes it; returns the loss."""
    total = sum(int((each["labels"] != -100).sum()) for each in batches)
    losses = []
    for each in batches:
        losses.append(model(**each, num_items_in_batch=torch.tensor(total)).loss)
        losses[-1].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return sum(loss.item() for loss in losses)


class InOrder(Trainer):
    """Takes rows in their own order, and keeps the state of torch's generator at each step."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Generators(TrainerCallback):
    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.states.append(torch.get_rng_state())


@pytest.mark.parametrize("micro", [5, 2])
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}], ids=["", "checkpointing"])
def test_a_run_of_trainer_is_a_loop_by_hand(tmp_path, micro, options):
    """With leave-one-out, token dropout and accumulated gradients; the loop by hand keeps all activations."""
    model, generators = prefix_model(drop_p=0.3), Generators()
    before = values(model)
    accumulated = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": -(-5 // micro)}
    run = trainer(model, tmp_path, InOrder, lr_scheduler_type="constant", **accumulated, **options)
    run.add_callback(generators)
    run.train()
    assert not any(torch.equal(x, y) for x, y in zip(values(model), before, strict=True))
    logged = [record for record in run.state.log_history if "grad_norm" in record]
    assert len(logged) == 5 == len(generators.states) and all(record["grad_norm"] > 0 for record in logged)
    assert model.get_base_model().is_activation_checkpointing == bool(options)

    other = prefix_model(drop_p=0.3)
    optimizer = torch.optim.AdamW(other.parameters(), lr=LR, weight_decay=0.0)
    batches = [batch(*range(i, min(i + micro, 5))) for i in range(0, 5, micro)]
    for record, state in zip(logged, generators.states, strict=True):
        torch.set_rng_state(state)
        assert step_by_hand(other, optimizer, *batches) == pytest.approx(record["loss"], rel=1e-6)
    assert same_bits(values(model), values(other))


def test_a_run_of_trainer_is_a_run_of_tune(tmp_path):
    """The same method by other code: packed rows, its own loss, schedule and clipping."""
    model = prefix_model()
    trainer(model, tmp_path, InOrder, lr_scheduler_type="cosine").train()
    options = settings("ct-kv", epochs=5, lr=LR, drop_p=0.0, reduction="tokens")
    result = tune(make_model("llama", torch.float32), TOKENIZER, DEMONSTRATIONS, "ct-kv", options)
    close(values(model), values(result.prefix), 1e-4)


@pytest.mark.parametrize("way", ["trainer", "saved"])
def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(tmp_path, way):
    """Token dropout included; the checkpoint holds the prefix alone."""
    whole = prefix_model(drop_p=0.3)
    trainer(whole, tmp_path / "whole").train()
    first = prefix_model(drop_p=0.3)
    run = trainer(first, tmp_path / "parts", save_strategy="epoch")
    run.add_callback(StopAfter(2))
    run.train()
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    assert not same_bits(values(first), values(whole))

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == set(first.state_dict())
    size = sum(x.numel() * x.element_size() for x in values(first))
    assert size < (checkpoint / "model.safetensors").stat().st_size < size + 4000

    if way == "trainer":
        second = prefix_model(drop_p=0.3)
    else:
        second = PrefixModel.from_pretrained(make_model("llama", torch.float32), checkpoint, drop_p=0.3)
        assert same_bits(values(second), values(first))
        assert second.prefixes["default"].metadata == first.prefixes["default"].metadata
    trainer(second, tmp_path / "parts").train(resume_from_checkpoint=str(checkpoint))
    assert same_bits(values(second), values(whole))


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step == self.steps


def test_a_checkpoint_of_another_run_is_no_start(tmp_path):
    other = prefix_model("gpt2")
    trainer(other, tmp_path, save_strategy="epoch", num_train_epochs=1).train()
    with pytest.raises(ValueError, match="made for GPT2LMHeadModel"):
        trainer(prefix_model(), tmp_path).train(resume_from_checkpoint=True)


def test_what_save_model_writes_can_be_loaded(tmp_path):
    model = prefix_model()
    trainer(model, tmp_path).save_model()
    loaded = PrefixModel.from_pretrained(make_model("llama", torch.float32), tmp_path, tokenizer=TOKENIZER)
    assert same_bits(values(loaded), values(model)) and not loaded.training


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tmp_path, reentrant):
    found = []
    for options in ({}, {"activation_checkpointing": True}):
        model = prefix_model(drop_p=0.3)
        kinds = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}} if options else {}
        trainer(model, tmp_path, **options, **kinds).train()
        found.append(values(model))
    assert same_bits(*found)


def test_compiled(tmp_path):
    found = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        model = prefix_model(drop_p=0.3, num_hidden_layers=2)
        trainer(model, tmp_path, num_train_epochs=2, **options).train()
        found.append(values(model))
    torch._dynamo.reset()
    close(found[1], found[0], 1e-3)


def test_mixed_precision(tmp_path):
    """bf16 inside, an fp32 prefix and gradient outside."""
    model = prefix_model()
    before = values(model)
    trainer(model, tmp_path, bf16=True).train()
    assert all(x.dtype == torch.float32 for x in values(model)) and not same_bits(values(model), before)


def test_evaluation_and_label_smoothing(tmp_path):
    """Would catch: dropout in evaluation, leave-one-out that is forgotten there, labels that are not shifted."""
    model = prefix_model(drop_p=0.3).eval()
    with torch.no_grad():
        output = model(**batch())
        labels = batch()["labels"][:, 1:]
        log = log_softmax(output.logits[:, :-1].float(), dim=-1)[labels != -100]
        nll = -log.gather(1, labels[labels != -100][:, None]).mean()
    plain = trainer(model, tmp_path, per_device_eval_batch_size=5)
    assert plain.evaluate()["eval_loss"] == pytest.approx(float(nll), rel=1e-5)
    smoothed = trainer(model, tmp_path, label_smoothing_factor=0.2, per_device_eval_batch_size=5)
    expected = 0.8 * nll - 0.2 * log.mean()
    assert smoothed.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantised_model(tmp_path, bits):
    """An evaluation between two epochs leaves 4-bit layers their derivative."""
    folder = tmp_path / "model"
    make_model("llama", torch.float32, hidden_size=64, intermediate_size=64, num_hidden_layers=2).save_pretrained(
        folder
    )
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    configuration = quantised if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=configuration, dtype=torch.float32)
    model = PrefixModel(base, make_prefix(base))
    run = trainer(model, tmp_path / "out", eval_strategy="epoch", learning_rate=3e-2)
    run.train()
    losses = [record["eval_loss"] for record in run.state.log_history if "eval_loss" in record]
    assert losses[-1] < losses[0] and model.is_quantized


@pytest.mark.parametrize("safe", [True, False])
def test_accelerate(tmp_path, safe):
    """`prepare`, `accumulate`, `save_state` and `load_state`: what goes on from a state has the bits of what never
    stopped."""

    def parts():
        model = prefix_model(drop_p=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        return accelerator, *accelerator.prepare(model, optimizer)

    def run(accelerator, model, optimizer, steps) -> None:
        for _ in range(steps):
            for each in (batch(0, 1, 2), batch(3, 4)):
                with accelerator.accumulate(model):
                    accelerator.backward(model(**each).loss)
                    optimizer.step()
                    optimizer.zero_grad()

    torch.manual_seed(1)
    whole = parts()
    run(*whole, 4)
    torch.manual_seed(1)
    first = parts()
    run(*first, 2)
    first[0].save_state(tmp_path, safe_serialization=safe)
    torch.manual_seed(99)
    second = parts()
    second[0].load_state(tmp_path)
    assert same_bits(values(second[1]), values(first[1]))
    run(*second, 2)
    assert same_bits(values(second[1]), values(whole[1]))
    assert not same_bits(values(first[1]), values(whole[1]))
    accelerator, model, _ = second
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "prefix", is_main_process=accelerator.is_main_process)
    loaded = PrefixModel.from_pretrained(make_model("llama", torch.float32), tmp_path / "prefix")
    assert same_bits(values(loaded), values(model))


def test_distributed_data_parallel(tmp_path):
    """It reduces the gradients of the prefix alone."""
    model = prefix_model()
    model(**batch()).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        wrapped(**batch()).loss.backward()
    finally:
        destroy_process_group()
    assert same_bits([p.grad for p in model.parameters()], expected)
