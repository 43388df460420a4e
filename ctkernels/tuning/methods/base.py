"""What a method is: a name, the settings it reads, and a function from a run to an adapter.

Run      one tuning run as a method sees it: the model, the task, the settings, and `train`, the one loop
Method   a row of the method table
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from torch.distributed.fsdp import FSDPModule

from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import EncodedContext, Row, TextFormat, encode_context, encode_rows
from ctkernels.tuning.hf.limits import check_context_length, check_row_lengths
from ctkernels.tuning.hf.models import config_hash, find_decoder
from ctkernels.tuning.methods.presets import PRESETS
from ctkernels.tuning.train.distributed import is_sharded
from ctkernels.tuning.train.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctkernels.tuning.adapters.adapter import Adapter

LOOP = frozenset({"epochs", "lr", "batch_rows", "clip_norm", "seed", "learn_stop", "layout", "max_tokens", "backend"})
DROPOUT = frozenset({"drop_p", "drop_from"})
LEAVE_ONE_OUT = frozenset({"leave_one_out", "leave_one_out_from"})


@dataclass(frozen=True)
class Run:
    """One tuning run, as a method sees it.

    method: its name.  reads: the settings that it reads.  settings: of the run.
    start_from: another task's adapter to start from, or None.
    train: the loop; trains a learner in place. `stage` names one of several loops of a run, whose settings may differ.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    demonstrations: tuple[Demonstration, ...]
    method: str
    reads: frozenset[str]
    settings: TrainSettings
    text_format: TextFormat
    start_from: Adapter | None
    train: Callable[..., None]

    @cached_property
    def context(self) -> EncodedContext:
        """The concatenated demonstrations. Raises DataError if the model's context is too short for them."""
        context = encode_context(self.tokenizer, self.demonstrations, self.text_format)
        check_context_length(self.model, len(context.input_ids))
        return context

    @cached_property
    def rows(self) -> list[Row]:
        """One training row per demonstration."""
        return encode_rows(self.tokenizer, self.demonstrations, self.text_format, self.settings.learn_stop)

    @property
    def start_tokens(self) -> tuple[int, ...]:
        """What every sequence starts with: BOS, or nothing."""
        context = encode_context(self.tokenizer, (), self.text_format)
        return tuple(context.input_ids.tolist())

    @property
    def recorded(self) -> dict[str, Any]:
        """What an adapter records about how it was made, as JSON values."""
        settings = {name: value for name, value in asdict(self.settings).items() if name in self.reads}
        return {"text_format": asdict(self.text_format), **settings}

    def check_rows(self, length: int, rows: Sequence[Row]) -> None:
        """Refuse rows that do not fit into the model's context behind `length` positions. Raises DataError."""
        check_row_lengths(self.model, length, rows)


@dataclass(frozen=True)
class Method:
    """A row of the method table.

    Args:
        name: as users write it.
        summary: one line for help texts.
        fit: makes the adapter, calling `run.train` for what gradients train.
        trains: what that is.
        transfers: what it can start from of another task's adapter.
        needs_demonstrations: least number of demonstrations.
        options: the `TrainSettings` fields it reads, besides those of the loop.
        starts: the values of `start` it takes.
        defaults: its own values of settings.
    """

    name: str
    summary: str
    fit: Callable[[Run], Adapter]
    trains: Literal["nothing", "prefix", "prompt", "lora", "lora and prefix"] = "nothing"
    transfers: Literal["nothing", "prefix", "prompt", "lora"] = "nothing"
    needs_demonstrations: int = 1
    options: frozenset[str] = frozenset()
    starts: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def settings(self, preset: str | None = None, **overrides: Any) -> TrainSettings:
        """The method's default settings, those of a `preset` (see `presets.py`) above them, `overrides` on top.

        Raises:
            ValueError: an unknown preset, or one without values for this method's settings; a setting that this method
                does not read, or a value out of its range.
        """
        for name in overrides:
            if name not in self.reads:
                raise ValueError(f"{self.name} does not read {name!r}; it reads {', '.join(sorted(self.reads))}")
        settings = TrainSettings(**{**self.defaults, **self._preset(preset), **overrides})
        self.check(settings)
        return settings

    @property
    def reads(self) -> frozenset[str]:
        """Names of the `TrainSettings` fields it takes."""
        return LOOP | self.options

    def check(self, settings: TrainSettings) -> None:
        """Refuse settings that this method would ignore. Raises ValueError."""
        for f in fields(TrainSettings):
            value = getattr(settings, f.name)
            if f.name not in self.reads and value != f.default:
                raise ValueError(f"{self.name} does not read {f.name}, got {value!r}")
        if self.starts and settings.start not in self.starts:
            raise ValueError(f"start of {self.name} must be one of {', '.join(self.starts)}, got {settings.start!r}")

    def _preset(self, preset: str | None) -> Mapping[str, Any]:
        if preset is None:
            return {}
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        if self.name not in PRESETS[preset] and self.defaults:
            there = ", ".join(PRESETS[preset])
            raise ValueError(f"{self.name} has no preset {preset!r}; the methods with one are {there}")
        return PRESETS[preset].get(self.name, {})


def require_transferable(method: Method, adapter: Adapter | None, model: PreTrainedModel) -> None:
    """Refuse an adapter that the method cannot start from, or of another model. Raises ValueError."""
    if adapter is None:
        return
    made_for, decoder = adapter.prefix.metadata, find_decoder(model)
    if made_for.config_hash != config_hash(decoder.config):
        raise ValueError(
            f"start_from was made for {made_for.model_class} {made_for.model_id!r}, whose configuration differs from "
            f"this {type(decoder.model).__name__} {decoder.model.name_or_path!r}"
        )
    if method.transfers == "nothing":
        raise ValueError(f"start_from must be None for {method.name}, which starts from nothing but its own task")
    if method.transfers == "prefix" and adapter.lora is not None:
        raise ValueError(
            f"start_from was made by {adapter.method}: its prefix belongs to other weights, {method.name} needs one of "
            "the model's own"
        )
    if getattr(adapter, method.transfers) is None:
        raise ValueError(f"start_from was made by {adapter.method} and has no {method.transfers} for {method.name}")


def require_weights(method: Method, model: PreTrainedModel) -> None:
    """Refuse a model whose weights are not where the method needs them. Raises ValueError."""
    gathered = any(isinstance(module, FSDPModule) for module in model.modules())  # only while all of it is called
    elsewhere = is_sharded(model) or any(p.is_meta for p in model.parameters())
    if (method.trains == "prompt" and gathered) or ("lora" in method.trains and elsewhere):
        raise ValueError(
            f"{method.name} trains {method.trains} and needs weights in one piece, but those of this "
            f"{type(model).__name__} are sharded or offloaded; methods that train nothing or the prefix do not"
        )


def require_demonstrations(method: Method, count: int, settings: TrainSettings) -> None:
    """Refuse a task with too few demonstrations. Raises DataError."""
    if count < 1 <= method.needs_demonstrations:
        raise DataError(f"{method.name} needs demonstrations, got none")
    hides = settings.leave_one_out != "none" and "leave_one_out" in method.options
    if hides and count < 2 and count >= settings.leave_one_out_from:
        raise DataError(
            f"leave-one-out needs at least two demonstrations, got {count}: its row would see nothing of the context; "
            'add demonstrations, or set leave_one_out="none"'
        )
    if count < method.needs_demonstrations:
        raise DataError(f"{method.name} needs at least {method.needs_demonstrations} demonstrations, got {count}")


__all__ = [
    "DROPOUT",
    "LEAVE_ONE_OUT",
    "LOOP",
    "Method",
    "Run",
    "require_demonstrations",
    "require_transferable",
    "require_weights",
]
