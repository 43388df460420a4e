"""KVPrefix: the trainable key/value prefix of a causal language model, all layers together.

prefix = KVPrefix.from_demonstrations(model, tokenizer, demonstrations)
with prefix.attach(model):                       # the model now sees the demonstrations before every row
    model(input_ids, labels=labels).loss.backward()
    model.generate(input_ids)
prefix.save_pretrained("runs/task")
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ctkernels import ContextMask
from ctkernels.tuning.adapters.file import MappedFile, Saved, faults, read_file, write_folder
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.formats import TextFormat, encode_context
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.encode import encode
from ctkernels.tuning.hf.fingerprint import Weights, base_weights
from ctkernels.tuning.hf.limits import check_context_length
from ctkernels.tuning.hf.models import architecture, config_hash, find_decoder, other_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOST_POSITION = (1 << 31) - 1  # kernels count positions in int32


@dataclass(frozen=True)
class PrefixMetadata:
    """Which model and tokenizer a prefix belongs to, and how it was made.

    model_class, model_id: class name and `name_or_path`.  config_hash, architecture: see `hf.models`.
    weights, body, vocabulary: `hf.fingerprint.Weights` of the model's own weights, without a LoRA update merged into
        them; None if they are not known.
    tokenizer_id, tokenizer_hash: `name_or_path` and `tokenizer_hash`, None if the prefix was made from tokens alone.
    method, settings: name of the tuning method and its settings, JSON values.
    """

    model_class: str
    model_id: str
    config_hash: str
    weights: str | None = None
    tokenizer_id: str | None = None
    tokenizer_hash: str | None = None
    method: str = "icl"
    settings: Mapping[str, Any] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=dict)
    body: str | None = None
    vocabulary: int | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        method: str = "icl",
        settings: Mapping[str, Any] | None = None,
    ) -> PrefixMetadata:
        """Metadata of a prefix for `model`. If processes hold parts of it, all of them have to make this call."""
        decoder = find_decoder(model)
        weights = base_weights(decoder.model)
        return cls(
            model_class=type(decoder.model).__name__,
            model_id=decoder.model.name_or_path,
            config_hash=config_hash(decoder.config),
            weights=None if weights is None else weights.whole,
            body=None if weights is None else weights.body,
            vocabulary=None if weights is None else weights.vocabulary,
            tokenizer_id=None if tokenizer is None else tokenizer.name_or_path,
            tokenizer_hash=None if tokenizer is None else tokenizer_hash(tokenizer),
            method=method,
            settings=dict(settings or {}),
            architecture=architecture(decoder.config),
        )

    def check(self, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Refuse another model or tokenizer than those that a prefix was made for; None is not compared.

        Raises:
            ValueError: the model's configuration or the tokenizer's vocabulary differs.
        """
        if model is not None:
            decoder = find_decoder(model)
            other = other_architecture(self, decoder.config)
            if other is not None:
                raise ValueError(
                    f"made for {self.model_class} {self.model_id!r}; this {type(decoder.model).__name__} "
                    f"{decoder.model.name_or_path!r} has {other}"
                )
        if tokenizer is not None and self.tokenizer_hash not in (None, tokenizer_hash(tokenizer)):
            raise ValueError(
                f"made with tokenizer {self.tokenizer_id!r}, not with this {tokenizer.name_or_path!r}, whose "
                "vocabulary is another one"
            )

    def check_weights(self, model: PreTrainedModel, path: str | os.PathLike, allow_other: bool = False) -> None:
        """Refuse a model of other weights than those that the prefix in `path` was made for, or warn if they are
        allowed. Where one of the two has no fingerprint, a model of another name is warned about.

        Raises:
            ValueError: their fingerprints differ.
        """
        model = find_decoder(model).model
        tuned = hasattr(model, "peft_config")  # then its weights have other names, and those of adapters beside them
        own = None if tuned else base_weights(model, alone=True)
        message = self.other_weights(own, model.name_or_path)
        if message is None:
            return
        if own is not None and self.weights is not None and not allow_other:
            raise ValueError(f"{message}; allow_other_weights=True takes it nonetheless")
        warnings.warn(f"{path}: {message}", stacklevel=4)

    def other_weights(self, own: Weights | None, own_id: str) -> str | None:
        """That a model of these weights (None: not known) and this name is not the one that the prefix was made for;
        None if it is. Names are compared where weights cannot be."""
        if own is None or self.weights is None:
            same, what = not self.model_id or not own_id or self.model_id == own_id, "perhaps with other weights"
        else:
            resized = self.body == own.body and self.vocabulary != own.vocabulary
            same, what = resized or self.weights == own.whole, f"with other weights ({own.whole}, not {self.weights})"
        if same:
            return None
        return (
            f"made for model {self.model_id!r}, loaded for {own_id!r} of the same configuration, {what}; with other "
            "weights the prefix means nothing"
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a tokenizer's vocabulary: every token, added ones included, with its id."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


_compared: WeakKeyDictionary[KVPrefix, WeakSet[PreTrainedModel]] = WeakKeyDictionary()  # see `compare_weights`


class KVPrefix(nn.Module):
    """Keys and values of P prefix tokens for every layer of one model.

    Args:
        keys, values: per layer `[Hk, P, D]`, keys after rotary embedding; fp32, or fp64 for an fp64 model.
        segments: int `[K+1]`, offsets of the K demonstrations in the prefix, non-decreasing within [0, P].
        first_position: position id of a row's first own token, normally P.
        metadata: what the prefix belongs to.
        states: what layers begin with that keep a state in place of keys and values, by name (`hf.states`); of the
            same type.
        context: int `[P]`, the tokens that the prefix was encoded from, where there is one for each of its keys.

    `keys` and `values` become ParameterLists, `segments` an int64 buffer, `states` a ParameterDict.

    Raises:
        ValueError, TypeError: shapes, types or offsets that do not fit together.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        segments: Tensor,
        first_position: int,
        metadata: PrefixMetadata,
        states: Mapping[str, Tensor] | None = None,
        context: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__()
        keys, values, segments = list(keys), list(values), torch.as_tensor(segments)
        _check_layers(keys, values)
        for name, x in (states or {}).items():
            if not isinstance(x, Tensor) or x.dtype != keys[0].dtype:
                raise TypeError(f"states[{name!r}] must be a tensor of type {keys[0].dtype}, got {_kind(x)}")
        length = keys[0].shape[1]
        _check_segments(segments, length)
        tokens = None if context is None else tuple(map(int, context))
        if tokens is not None and (len(tokens) != length or any(token < 0 for token in tokens)):
            raise ValueError(f"context must hold a token id for each of the {length} prefix tokens, got {len(tokens)}")
        if isinstance(first_position, bool) or not isinstance(first_position, int) or first_position < 0:
            raise ValueError(f"first_position must be an integer >= 0, got {first_position!r}")
        if first_position > MOST_POSITION:
            raise ValueError(f"first_position must be at most {MOST_POSITION}, got {first_position}")
        with torch.inference_mode(False):  # tensors made in inference mode could not be trained
            self.keys = nn.ParameterList(nn.Parameter(_trainable(x)) for x in keys)
            self.values = nn.ParameterList(nn.Parameter(_trainable(x)) for x in values)
            self.states = nn.ParameterDict({name: nn.Parameter(_trainable(x)) for name, x in (states or {}).items()})
            self.segments: Tensor
            self.register_buffer("segments", _trainable(segments).to(keys[0].device, torch.int64))
        self.first_position = first_position
        self.metadata = metadata
        self.context = tokens
        self.file: MappedFile | None = None  # that its tensors are views of

    @property
    def length(self) -> int:
        """P, the number of prefix tokens."""
        return self.keys[0].shape[1]

    @property
    def num_demonstrations(self) -> int:
        """K. With K = 1, leave-one-out would hide every demonstration from every row."""
        return self.segments.shape[0] - 1

    def extra_repr(self) -> str:
        heads, length, dimension = self.keys[0].shape
        return (
            f"{self.metadata.method} for {self.metadata.model_class}: {len(self.keys)} layers of [{heads}, {length}, "
            f"{dimension}], {self.num_demonstrations} demonstrations, rows from position {self.first_position}"
        )

    @classmethod
    def from_tokens(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor,
        segments: Tensor,
        tokenizer: PreTrainedTokenizerBase | None = None,
        method: str = "icl",
        settings: Mapping[str, Any] | None = None,
    ) -> KVPrefix:
        """The keys and values of a context: one forward pass of the stock model, without logits and without gradients.

        Args:
            input_ids: int `[P]`; P = 0 gives an empty prefix.
            segments: int `[K+1]`, offsets of the demonstrations in `input_ids`.
            tokenizer: recorded in the metadata.
            method, settings: recorded in the metadata.

        Raises:
            TypeError: a model class that is not supported, named; input_ids of a wrong type.
            ValueError: more tokens than the model's context (both numbers are named), a model with a prefix attached.
        """
        input_ids = torch.as_tensor(input_ids)
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise TypeError(f"input_ids must be integers [P], got {input_ids.dtype}")
        if input_ids.dim() != 1:
            raise ValueError(f"input_ids must have shape [P], got {tuple(input_ids.shape)}")
        length = input_ids.shape[0]
        check_context_length(model, length)
        _check_segments(torch.as_tensor(segments), length)
        keys, values, states = encode(model, input_ids)
        metadata = PrefixMetadata.of(model, tokenizer, method, settings)
        return cls(keys, values, segments, length, metadata, states, input_ids)

    @classmethod
    def from_demonstrations(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        demonstrations: Sequence[Demonstration],
        text_format: TextFormat | None = None,
        method: str = "icl",
    ) -> KVPrefix:
        """The keys and values of the concatenated demonstrations, with the text format and the method recorded in the
        metadata.

        One demonstration is enough for in-context learning; see `num_demonstrations` for what it means for tuning.

        Raises:
            ValueError: no demonstrations; as `from_tokens` and `data.encode_context`.
        """
        if len(demonstrations) == 0:
            raise ValueError("demonstrations must hold at least one pair, got none")
        text_format = text_format or TextFormat()
        context = encode_context(tokenizer, demonstrations, text_format)
        settings = {"text_format": text_format.recorded}
        return cls.from_tokens(model, context.input_ids, context.segments, tokenizer, method, settings)

    def attach(
        self,
        model: PreTrainedModel,
        mask: ContextMask | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
        allow_other_weights: bool = False,
    ) -> Attachment:
        """A context manager in which `model` reads this prefix before every row; it yields the `Attachment`.

        Args:
            model: of the class and configuration the prefix was made for; its weights and their requires_grad stay.
            mask: which prefix positions each row sees (default: all).
            cu_seqlens: int32 `[B+1]`, if rows are packed into one sequence `[1, N]`.
            backend: as in `ctkernels.prefix_attention`.
            allow_other_weights: as in `from_pretrained`. A prefix is compared with a model once.

        Raises:
            TypeError: an unsupported model class, named; a prefix in a type the model cannot read.
            ValueError: a prefix for another model, for other weights, on another device, or a model that already has
                one attached.
        """
        if allow_other_weights:
            self.compare_weights(model, allow_other_weights=True)
        return Attachment(self, model, mask=mask, cu_seqlens=cu_seqlens, backend=backend)

    def compare_weights(
        self, model: PreTrainedModel, path: str | os.PathLike = "prefix", allow_other_weights: bool = False
    ) -> None:
        """Refuse weights that the prefix was not made for, or warn of them; a model that passed is not read again.

        Raises:
            ValueError: other weights.
        """
        if find_decoder(model).model not in _compared.get(self, ()):
            self.metadata.check_weights(model, path, allow_other_weights)
            self.assume_weights(model)

    def assume_weights(self, model: PreTrainedModel) -> None:
        """Take the model's weights for those that the prefix was made for, without reading them."""
        _compared.setdefault(self, WeakSet()).add(find_decoder(model).model)

    def check_file(self) -> None:
        """Refuse to read a mapped file that another program has written into.

        Raises:
            PrefixFileError: such a file.
        """
        if self.file is not None:
            self.file.check()

    def place(self, devices: Sequence[torch.device]) -> KVPrefix:
        """Move each layer to its device, and the segments to the first. Returns the prefix itself."""
        self.to(devices[0])
        for layers in (self.keys, self.values):
            for index, device in enumerate(devices):
                if layers[index].device != device:
                    layers[index] = nn.Parameter(layers[index].detach().to(device), layers[index].requires_grad)
        return self

    def save_pretrained(self, directory: str | os.PathLike, card: bool = False) -> None:
        """Write the prefix into `directory`, as one file that replaces what is there in one step (see `file.py`).

        card: also write a model card, README.md.

        Raises:
            PrefixFileError: a value that is not finite.
            TypeError: settings that JSON cannot hold.
            OSError: the disk.  What was there before is unharmed and nothing half-written remains.
        """
        write_folder(directory, *self.parts(), with_card=card)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        allow_other_weights: bool = False,
    ) -> KVPrefix:
        """Read a prefix, from a folder or its file. With `model` and `tokenizer` it is checked against them, and put on
        the model's device.

        allow_other_weights: warn, and raise no error, if the model has other weights than the prefix was made for.
        Quantised weights are other weights.

        Warns if an update of the weights belongs to the prefix, which `Adapter.from_pretrained` reads, and if the model
        has another name where this process cannot tell its weights.

        Raises:
            PrefixFileError: a missing, damaged, foreign or too new file, or a prefix for another model, for other
                weights or another tokenizer.
        """
        saved = read_file(directory, "adapter")
        prefix = cls.from_parts(saved, model, tokenizer, allow_other_weights)
        if "lora" in saved.description:
            warnings.warn(
                f"{saved.path}: the prefix belongs to a LoRA update beside it; Adapter.from_pretrained reads both",
                stacklevel=2,
            )
        return prefix

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Its description and its tensors, as `file.py` stores them. Raises PrefixFileError as `check_file`."""
        self.check_file()
        description = {
            "segments": self.segments.tolist(),
            "first_position": self.first_position,
            "metadata": asdict(self.metadata),
        }
        if self.context is not None:
            description["context"] = list(self.context)
        layers = {
            f"{kind}.{index}": layer for kind in ("keys", "values") for index, layer in enumerate(getattr(self, kind))
        }
        return description, layers | {f"states.{name}": x for name, x in self.states.items()}

    @classmethod
    def from_parts(
        cls,
        saved: Saved,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        allow_other_weights: bool = False,
    ) -> KVPrefix:
        """The prefix of a file that was read. Arguments, warnings and errors as in `from_pretrained`."""
        decoder = None if model is None else find_decoder(model)
        path, description, tensors = saved
        with faults(path):
            metadata = PrefixMetadata(**description["metadata"])
            metadata.check(model, tokenizer)
            known = {"keys", "values", "states"} | ({"prompt", "lora"} & description.keys())
            unknown = [name for name in tensors if name.partition(".")[0] not in known]
            if unknown:
                raise ValueError(f"holds a tensor {unknown[0]}, of which nothing is known")
            layers = range(len({name.partition(".")[2] for name in tensors if name.startswith(("keys.", "values."))}))
            keys, values = ([tensors[f"{kind}.{index}"] for index in layers] for kind in ("keys", "values"))
            states = {name.removeprefix("states."): x for name, x in tensors.items() if name.startswith("states.")}
            segments, first_position = torch.tensor(description["segments"]), description["first_position"]
            prefix = cls(keys, values, segments, first_position, metadata, states, description.get("context"))
        if decoder is not None:
            prefix.to(dtype=decoder.prefix_dtype).place(decoder.devices)
            with faults(path):
                prefix.compare_weights(decoder.model, path, allow_other_weights)
        return prefix


def _trainable(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x.detach()


def _check_layers(keys: list[Tensor], values: list[Tensor]) -> None:
    if not keys or len(keys) != len(values):
        raise ValueError(f"keys and values must hold one tensor per layer, got {len(keys)} and {len(values)}")
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        for name, x in (("keys", key), ("values", value)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise TypeError(f"{name}[{index}] must be a floating tensor [Hk, P, D], got {_kind(x)}")
            if x.dim() != 3:
                raise ValueError(f"{name}[{index}] must have shape [Hk, P, D], got {tuple(x.shape)}")
        if key.shape[:2] != value.shape[:2] or key.dtype != value.dtype:  # D may differ
            raise ValueError(f"values[{index}] must be like keys[{index}], {_kind(key)}, got {_kind(value)}")
        if key.shape[1] != keys[0].shape[1]:
            raise ValueError(
                f"keys[{index}] must have the P = {keys[0].shape[1]} tokens of keys[0], got {key.shape[1]}"
            )


def _check_segments(segments: Tensor, length: int) -> None:
    if segments.is_floating_point() or segments.dtype == torch.bool or segments.dim() != 1 or not segments.numel():
        raise ValueError(f"segments must be an integer tensor [K+1], got {_kind(segments)}")
    offsets = segments.tolist()
    if offsets[0] < 0 or offsets[-1] > length or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(f"segments must be non-decreasing offsets within the {length} prefix tokens, got {offsets}")


def _kind(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
