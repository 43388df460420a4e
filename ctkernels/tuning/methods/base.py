"""What a method is: a name, the class of its settings, and a function from a run to an adapter.

Run      one tuning run as a method sees it: the model, the task, the settings, and `train`, the one loop
Method   a row of the method table
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from torch.distributed.fsdp import FSDPModule

from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import EncodedContext, PairEncoder, Row, TextFormat, encode_context, encode_rows
from ctkernels.tuning.hf.limits import check_context_length, check_row_lengths
from ctkernels.tuning.hf.models import find_decoder, other_architecture
from ctkernels.tuning.methods.presets import PRESETS
from ctkernels.tuning.objectives import OBJECTIVES
from ctkernels.tuning.train.distributed import is_sharded
from ctkernels.tuning.train.masks import LeaveOneOut
from ctkernels.tuning.train.options import LoopOptions, Options, choices, layered, neutral, type_hints

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctkernels.tuning.adapters.adapter import Adapter

S = TypeVar("S", bound=Options)
S_co = TypeVar("S_co", bound=Options, covariant=True)


@dataclass(frozen=True)
class Run(Generic[S_co]):
    """One tuning run, as a method sees it.

    method: its name.  settings: what it reads.  start_from: another task's adapter to start from, or None.
    train: the loop; trains a learner in place. One of several loops of a run has a `stage`, its name, and may have
        settings of its own. `result` makes the adapter of what is trained as it is now, for held-out items.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    demonstrations: tuple[Demonstration, ...]
    method: str
    settings: S_co
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
        return self.encode_rows()

    def encode_rows(self, encoder: PairEncoder | None = None) -> list[Row]:
        """One training row per demonstration, as the objective needs it, perhaps by an encoder of its own.

        Raises:
            DataError: an input or output without tokens, or without room; the objective needs options and there are
                none.
        """
        settings = self.settings
        if not isinstance(settings, LoopOptions):
            return encode_rows(self.tokenizer, self.demonstrations, self.text_format, encoder=encoder)
        return encode_rows(
            self.tokenizer,
            self.demonstrations,
            self.text_format,
            settings.learn_stop,
            encoder,
            OBJECTIVES[settings.objective].choices,
            settings.score,
        )

    @property
    def start_tokens(self) -> tuple[int, ...]:
        """What every sequence starts with: BOS and the instruction, where there are any."""
        return PairEncoder(self.tokenizer, self.text_format).start

    @property
    def bos_tokens(self) -> tuple[int, ...]:
        """BOS, or nothing."""
        return PairEncoder(self.tokenizer, self.text_format).bos

    @property
    def recorded(self) -> dict[str, Any]:
        """What an adapter records about how it was made, as JSON values."""
        return {"text_format": self.text_format.recorded, **asdict(self.settings)}

    def check_rows(self, length: int, rows: Sequence[Row]) -> None:
        """Refuse rows and their options that do not fit into the model's context behind `length` positions. Raises
        DataError."""
        longer = [replace(r, tokens=r.tokens[:start] + own, choices=()) for r in rows for start, own in r.branches]
        check_row_lengths(self.model, length, [*rows, *longer])


@dataclass(frozen=True)
class Method(Generic[S]):
    """A row of the method table.

    Args:
        name: as users write it.
        summary: one line for help texts.
        options: the class of its settings, whose fields are all that it reads.
        fit: makes the adapter, calling `run.train` for what gradients train.
        trains: what that is.
        transfers: what it can start from of another task's adapter.
        needs_demonstrations: least number of demonstrations.
    """

    name: str
    summary: str
    options: type[S]
    fit: Callable[[Run[S]], Adapter]
    trains: Literal["nothing", "prefix", "prompt", "lora", "lora and prefix"] = "nothing"
    transfers: Literal["nothing", "prefix", "prompt", "lora"] = "nothing"
    needs_demonstrations: int = 1

    def settings(self, preset: str | None = None, **overrides: Any) -> S:
        """The method's default settings, those of a `preset` (see `presets.py`) above them, `overrides` on top. What an
        override says of the length of training (`epochs` or `steps`) replaces what the preset says of it.

        Raises:
            ValueError: an unknown preset, or one without values for this method's settings; a setting that this method
                does not read, or a value out of its range.
        """
        for name in overrides:
            if name not in self.reads:
                raise ValueError(f"{self.name} does not read {name!r}; it reads {', '.join(sorted(self.reads))}")
        return self._made(layered(self._preset(preset), overrides))

    @property
    def reads(self) -> frozenset[str]:
        """Names of the settings it takes."""
        return frozenset(f.name for f in fields(self.options))

    def pick(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of some settings that it reads, for whoever sets up several methods alike."""
        return {name: value for name, value in settings.items() if name in self.reads}

    def accept(self, settings: Options) -> S:
        """Settings of any class as this method's own.

        Raises:
            ValueError: a setting that this method does not read and that is not at its neutral default: it would be
                ignored; a value that this method does not take.
            TypeError: no settings.
        """
        if not isinstance(settings, Options):
            raise TypeError(f"settings must be {self.options.__name__} or TrainSettings, got {type(settings).__name__}")
        if type(settings) is self.options:
            return settings
        values = {f.name: getattr(settings, f.name) for f in fields(settings)}
        for name, value in values.items():
            if name not in self.reads and value != neutral(type(settings), name):
                raise ValueError(f"{self.name} does not read {name}, got {value!r}")
        return self._made(self.pick(values))

    def _made(self, values: Mapping[str, Any]) -> S:
        for name, value in values.items():
            allowed = choices(type_hints(self.options)[name])
            if allowed and value not in allowed:
                raise ValueError(f"{name} of {self.name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        return self.options(**values)

    def _preset(self, preset: str | None) -> Mapping[str, Any]:
        if preset is None:
            return {}
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        if self.name not in PRESETS[preset] and self.options is not Options:
            there = ", ".join(PRESETS[preset])
            raise ValueError(f"{self.name} has no preset {preset!r}; the methods with one are {there}")
        return PRESETS[preset].get(self.name, {})


def require_transferable(method: Method, adapter: Adapter | None, model: PreTrainedModel) -> None:
    """Refuse an adapter that the method cannot start from, or of another model. Raises ValueError."""
    if adapter is None:
        return
    made_for, decoder = adapter.prefix.metadata, find_decoder(model)
    other = other_architecture(made_for, decoder.config)
    if other is not None:
        raise ValueError(
            f"start_from was made for {made_for.model_class} {made_for.model_id!r}; this "
            f"{type(decoder.model).__name__} {decoder.model.name_or_path!r} has {other}"
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


def require_loaded(model: object, tokenizer: object) -> None:
    """Refuse the name of a model or tokenizer. Raises TypeError."""
    for name, value, loader in (("model", model, "AutoModelForCausalLM"), ("tokenizer", tokenizer, "AutoTokenizer")):
        if isinstance(value, (str, os.PathLike)):
            raise TypeError(
                f"{name} must be loaded, got its name {str(value)!r}; load it with "
                f"{loader}.from_pretrained({str(value)!r})"
            )


def require_weights(method: Method, model: PreTrainedModel) -> None:
    """Refuse a model whose weights are not where the method needs them. Raises ValueError."""
    gathered = any(isinstance(module, FSDPModule) for module in model.modules())  # only while all of it is called
    elsewhere = is_sharded(model) or any(p.is_meta for p in model.parameters())
    if (method.trains == "prompt" and gathered) or ("lora" in method.trains and elsewhere):
        raise ValueError(
            f"{method.name} trains {method.trains} and needs weights in one piece, but those of this "
            f"{type(model).__name__} are sharded or offloaded; methods that train nothing or the prefix do not"
        )


def require_demonstrations(method: Method, count: int, settings: Options) -> None:
    """Refuse a task with too few demonstrations. Raises DataError."""
    if count < 1 <= method.needs_demonstrations:
        raise DataError(f"{method.name} needs demonstrations, got none")
    if count < 2 and isinstance(settings, LeaveOneOut) and settings.hides(count):
        raise DataError(
            f"leave-one-out needs at least two demonstrations, got {count}: its row would see nothing of the context; "
            'add demonstrations, or set leave_one_out="none"'
        )
    if count < method.needs_demonstrations:
        raise DataError(f"{method.name} needs at least {method.needs_demonstrations} demonstrations, got {count}")
