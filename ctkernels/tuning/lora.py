"""LoRA updates of a model's weights (Hu et al., arXiv 2106.09685), done by peft and taken off again afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctkernels.tuning.hf_models import find_decoder

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

GROUPED = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
# class with the language model head -> the modules that test-time training updates
TARGETS: Mapping[str, tuple[str, ...]] = {
    "GPT2LMHeadModel": ("c_attn", "c_proj", "c_fc"),
    "OPTForCausalLM": ("q_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "BloomForCausalLM": FUSED,
    "GPTNeoXForCausalLM": FUSED,
    "Phi3ForCausalLM": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}


@dataclass
class Lora:
    """A LoRA update: weight += alpha / rank * B A in every module named in `targets`.

    tensors: A and B by peft's names, empty before training (A is then drawn from `seed`, B is zero).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def config(self, model: PreTrainedModel) -> LoraConfig:
        """The update as peft describes it."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            fan_in_fan_out=find_decoder(model).family.causal == "GPT2LMHeadModel",  # its Conv1D holds [in, out]
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )

    @contextmanager
    def injected(self, model: PreTrainedModel) -> Iterator[PeftModel]:
        """Within the block the model computes with the update, whose A and B can be trained; then it is as it was.

        Raises:
            ValueError: targets that the model does not have; a model that carries a peft adapter already.
            ModuleNotFoundError: peft is not installed.
        """
        peft = _import_peft()
        if hasattr(model, "get_base_model") or hasattr(model, "peft_config"):
            raise ValueError("the model carries a peft adapter already; test-time training needs the model without it")
        flags = [(p, p.requires_grad) for p in model.parameters()]
        wrapped = None
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                # peft 0.21 still asks for a name that transformers is about to rename
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                torch.manual_seed(self.seed)
                wrapped = peft.get_peft_model(model, self.config(model))
            if self.tensors:
                peft.set_peft_model_state_dict(wrapped, self.tensors)
            yield wrapped
        finally:
            if wrapped is not None:
                wrapped.unload()
            vars(model).pop("peft_config", None)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    @contextmanager
    def merged(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the block the update is part of the model's weights; afterwards they have the bits they had before."""
        before = [(p, p.data) for p in model.parameters()]
        try:
            with self.injected(model) as wrapped:
                wrapped.merge_and_unload(safe_merge=True)  # safe: into copies, the original tensors stay what they are
                yield
        finally:
            for parameter, data in before:
                parameter.data = data

    def capture(self, wrapped: PeftModel) -> None:
        """Take over A and B from an injected model."""
        from peft import get_peft_model_state_dict

        state: dict[str, Any] = get_peft_model_state_dict(wrapped)
        self.tensors = {name: tensor.detach().clone() for name, tensor in state.items()}


def lora_targets(model: nn.Module, names: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The modules to update: `names`, or else those of the model's family.

    Raises:
        ValueError: a name that no module of the model has.
    """
    decoder = find_decoder(model)
    names = names or TARGETS.get(decoder.family.causal, GROUPED)
    found = {path.rpartition(".")[2] for path, _ in decoder.base.named_modules()}
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"lora_targets: {type(decoder.model).__name__} has no module named {', '.join(missing)}")
    return names


def _import_peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError:
        raise ModuleNotFoundError("test-time training needs peft: pip install 'ctkernels[tuning]'") from None
    return peft
