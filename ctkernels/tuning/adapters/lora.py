"""LoRA updates of a model's weights (Hu et al., arXiv 2106.09685), done by peft and taken off again afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctkernels.tuning.hf.fingerprint import base_held
from ctkernels.tuning.hf.models import find_decoder

if TYPE_CHECKING:
    from peft import LoraConfig, LoraModel
    from transformers import PreTrainedModel

GROUPED = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = (("in_features", "nx"), ("out_features", "nf"))  # of a linear layer, or of the Conv1D of GPT-2
ADAPTER = "default"  # peft's name of a model's only adapter
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

    tensors: A and B by the names of peft's files, fp32 (fp64 for an fp64 model); empty before training, when A is
        drawn from `seed` and B is zero.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def config(self, model_class: str) -> LoraConfig:
        """The update of a model of this class as peft describes it."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            fan_in_fan_out=model_class.startswith("GPT2"),  # whose Conv1D holds [in, out]
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )

    def check(self, model: nn.Module | None = None) -> None:
        """Refuse tensors that are not A and B of this rank, for the modules of `model` that are updated; None is any
        model. Nothing of their size is made.

        Raises:
            ValueError: what does not fit, named.
        """
        numbers = isinstance(self.rank, int) and self.rank >= 1 and isinstance(self.alpha, (int, float))
        if not numbers or isinstance(self.rank, bool) or not math.isfinite(self.alpha):
            raise ValueError(f"a LoRA rank must be an integer >= 1 and alpha finite, got {self.rank!r}, {self.alpha!r}")
        expected: dict[str, tuple[int, int]] = {}
        if model is None:
            halves = [name.rpartition(".lora_")[0] for name in self.tensors]
            names = {f"{module}.lora_{half}.weight" for module in halves for half in "AB"}
        else:
            expected = self._shapes(model)
            names = set(expected)
        for name in sorted(names | self.tensors.keys()):
            found = tuple(self.tensors[name].shape) if name in self.tensors else None
            if name not in names or found is None or (name in expected and found != expected[name]):
                raise ValueError(f"{name} must have shape {expected.get(name)}, got {found}")
            if len(found) != 2 or found[name.endswith(".lora_B.weight")] != self.rank:
                raise ValueError(f"{name} must have the rank {self.rank}, got shape {found}")
            if not self.tensors[name].is_floating_point():
                raise ValueError(f"{name} must be floating, got {self.tensors[name].dtype}")

    def _shapes(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Shapes of A and B of every module that is updated."""
        shapes = {}
        for path, module in model.named_modules():
            if any(path == target or path.endswith(f".{target}") for target in self.targets):
                width, out = (getattr(module, a, getattr(module, b, None)) for a, b in SIZES)
                if width is None or out is None:
                    raise ValueError(f"lora_targets: {path} is a {type(module).__name__}, not a linear layer")
                shapes[f"base_model.model.{path}.lora_A.weight"] = (self.rank, width)
                shapes[f"base_model.model.{path}.lora_B.weight"] = (out, self.rank)
        return shapes

    @contextmanager
    def injected(self, model: PreTrainedModel, dropout: float = 0.0) -> Iterator[LoraModel]:
        """Within the block the model computes with the update, whose A and B can be trained; then it is as it was.

        dropout: probability that an entry of what A reads is zero, where the `lora_dropout` modules are in training
            mode.

        Raises:
            ValueError: targets that the model does not have; tensors of other modules or shapes; a model that carries a
                peft adapter already.
            ModuleNotFoundError: peft is not installed.
        """
        peft = _import_peft()
        if self.tensors:
            self.check(model)
        if hasattr(model, "get_base_model") or hasattr(model, "peft_config"):
            raise ValueError("the model carries a peft adapter already; test-time training needs the model without it")
        flags = [(p, p.requires_grad) for p in model.parameters()]
        wrapped = None
        with base_held(model):
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed the GPUs, too
                    config = self.config(find_decoder(model).family.causal)
                    config.lora_dropout = dropout
                    wrapped = peft.LoraModel(model, {ADAPTER: config}, ADAPTER)
                for name, parameter in lora_parameters(wrapped).items():
                    wide = parameter.data if parameter.dtype == torch.float64 else parameter.data.float()
                    parameter.data = self.tensors[name].to(wide, copy=True) if self.tensors else wide
                yield wrapped
            finally:
                if wrapped is not None:
                    wrapped.unload()  # takes off what merging has left, too
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    @contextmanager
    def merged(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the block the update is part of the model's weights; afterwards they have the bits they had before.

        Beside quantised weights it is computed on its own: in them it would be rounded like them.
        """
        with base_held(model):  # which may unpack quantised weights
            before = [(p, p.data) for p in model.parameters()]
            try:
                with self.injected(model) as wrapped:
                    wrapped.requires_grad_(False)
                    if getattr(model, "hf_quantizer", None) is None:
                        wrapped.merge_and_unload(safe_merge=True)  # safe: into copies, the original tensors stay
                    yield
            finally:
                for parameter, data in before:
                    parameter.data = data

    def capture(self, wrapped: LoraModel) -> None:
        """Take over A and B from an injected model."""
        self.tensors = {name: p.detach().clone() for name, p in lora_parameters(wrapped).items()}


def lora_parameters(wrapped: LoraModel) -> dict[str, nn.Parameter]:
    """A and B of an injected model, by the names they have in peft's files."""
    return {
        f"base_model.{name}".replace(f".{ADAPTER}.", "."): p
        for name, p in wrapped.named_parameters()
        if ".lora_" in name
    }


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
