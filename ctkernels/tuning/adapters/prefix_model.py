"""PrefixModel: a frozen model and its prefixes as one module, for `transformers.Trainer`, accelerate and loops of one's
own. Its parameters are those of the prefixes alone, and so are its state and its checkpoints.

model = PrefixModel(model, KVPrefix.from_demonstrations(model, tokenizer, demonstrations), drop_p=0.05)
Trainer(model, arguments, train_dataset=rows).train()      # a column `held_out` of the rows: leave-one-out
model.save_pretrained("runs/task")                         # one small file; push_to_hub("me/task")
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ctkernels import ContextMask
from ctkernels.tuning.adapters.file import FILE_NAME, PrefixFileError
from ctkernels.tuning.adapters.prefix import KVPrefix, PrefixMetadata
from ctkernels.tuning.adapters.sources import described, located, read_prefixes
from ctkernels.tuning.hf.attach import Attachment, check_fit
from ctkernels.tuning.hf.forward import frozen, set_mode
from ctkernels.tuning.hf.models import find_decoder

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedTokenizerBase

DEFAULT = "default"  # peft's name of the only adapter
NAME = re.compile(r"[\w-]+")  # of an adapter: also of a folder, and part of the names of tensors
HELD_OUT = "held_out must be the index of a demonstration of the prefix, or -1, for each row"


class PrefixModel(nn.Module):
    """A transformers model, whose weights are frozen, with a prefix attached until `unload`.

    Args:
        model: of a supported class. Its weights need no gradient and its dropout is off, also in training mode;
            gradient checkpointing works. It is no submodule, so that `parameters`, `state_dict` and `modules` have none
            of it; `to`, `train` and `eval` do reach it, and attributes that this class lacks are those of the model.
        prefix: one prefix, named "default", or several by name, of which the first is active.
        drop_p: probability in [0, 1) that a row does not see a prefix token, drawn anew in every forward pass in
            training mode.
        backend: as in `ctkernels.prefix_attention`.

    Raises:
        TypeError, ValueError: as `KVPrefix.attach`; a name that is not made of letters, digits, `_` and `-`.
    """

    _hf_peft_config_loaded = True  # for transformers: there is an adapter, so a quantised model may be trained

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: KVPrefix | Mapping[str, KVPrefix],
        drop_p: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or isinstance(model, KVPrefix):
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
        ContextMask(drop_p=drop_p)  # refuses what is no probability
        prefixes = {DEFAULT: prefix} if isinstance(prefix, KVPrefix) else dict(prefix)
        if not prefixes:
            raise ValueError("prefix must be a KVPrefix, or several by name, got none")
        object.__setattr__(self, "_model", model)
        self.prefixes = nn.ModuleDict()
        self.drop_p, self.backend = drop_p, backend
        self.active_adapter = next(iter(prefixes))
        self._disabled, self._unloaded = False, False
        self._attachment: Attachment | None = None
        self._attached, self._frozen = ExitStack(), ExitStack()
        for name, each in prefixes.items():
            self.add_adapter(name, each)
        self._attach()
        weakref.finalize(self, self._frozen.close)
        self._frozen.callback(self._attached.close)
        self._frozen.enter_context(frozen(model))
        self.train(self.training)

    # what it computes

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        held_out: Tensor | Sequence[int] | None = None,
        row_ids: Tensor | Sequence[int] | None = None,
        dropout_seed: int | Tensor | None = None,
        mask: ContextMask | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward pass behind the active prefix, with the model's own output and loss.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, labels, kwargs: the model's arguments, of the rows'
                own tokens alone.
            held_out: int `[B]`, the demonstration of the prefix that each row must not see; -1 hides nothing.
            row_ids: int `[B]`, each row's number in the random stream of token dropout (default 0..B-1).
            dropout_seed: of this pass, an int or a tensor that repeats one; default: drawn from torch's generator of
                the CPU, which Trainer and accelerate save and restore. Under `torch.compile(fullgraph=True)` give it.
            mask: a mask of your own in place of all that.

        Where the prefix is disabled, what is said about it has no effect. In eval mode there is no token dropout.

        Raises:
            ValueError, TypeError: a value that cannot be used, or several, named; `unload` was called.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None}
        attachment = self._required()
        if attachment is None:
            return self._model(**kwargs)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        rows = 1 if tokens is None else tokens.shape[0]
        attachment.mask = self._mask(rows, held_out, row_ids, dropout_seed, mask)
        try:
            return self._model(**kwargs)
        finally:
            attachment.mask = None  # `generate`, and whoever runs the model itself, see the whole prefix

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate` behind the active prefix, which all rows see as a whole."""
        self._required()
        return self._model.generate(*args, **kwargs)

    def _required(self) -> Attachment | None:
        """None if the prefix is disabled. Raises ValueError after `unload`."""
        if self._unloaded:
            raise ValueError("this PrefixModel was unloaded, so that its model has no prefix; make another one")
        return self._attachment

    def _mask(
        self,
        rows: int,
        held_out: Tensor | Sequence[int] | None,
        row_ids: Tensor | Sequence[int] | None,
        seed: int | Tensor | None,
        mask: ContextMask | None,
    ) -> ContextMask | None:
        if mask is not None:
            if held_out is not None or row_ids is not None or seed is not None:
                raise ValueError("give mask, or held_out, row_ids and dropout_seed, which make one; not both")
            return mask
        segments = self.prefixes[self.active_adapter].segments
        drop_p = self.drop_p if self.training else 0.0
        if held_out is None and not drop_p:
            return None
        held_out, row_ids = (None if x is None else torch.as_tensor(x) for x in (held_out, row_ids))
        for name, x in (("held_out", held_out), ("row_ids", row_ids)):
            if x is not None and x.dim() == 1 and rows > 1 and x.shape[0] != rows:  # one may be rows that are packed
                raise ValueError(f"{name} must have an entry for each of {rows} rows, got {x.shape[0]}")
        row_ids = None if row_ids is None else row_ids.to(segments.device)
        seed = (_draw() if seed is None else _single(seed)) if drop_p else 0
        if held_out is None:
            return ContextMask(drop_p=drop_p, seed=seed, row_ids=row_ids)
        if torch.compiler.is_compiling():
            held_out = held_out.to(segments.device)
            torch._assert_async(((held_out >= -1) & (held_out < segments.shape[0] - 1)).all(), HELD_OUT)
            return ContextMask.leave_one_out(segments, held_out, drop_p, seed, row_ids)
        hidden = ContextMask.leave_one_out(segments.cpu(), held_out.cpu()).hidden  # on the CPU values are checked
        return ContextMask(hidden.to(segments.device), drop_p, seed, row_ids)

    # several prefixes, by peft's names

    @property
    def active_adapters(self) -> list[str]:
        """The name of the active prefix, in a list."""
        return [self.active_adapter]

    def add_adapter(self, adapter_name: str, prefix: KVPrefix) -> None:
        """Add a prefix, which is not active yet and needs no gradient until it is.

        Raises:
            TypeError, ValueError: a prefix that does not fit the model; a name that cannot be one, or is taken.
        """
        if not isinstance(prefix, KVPrefix):
            raise TypeError(f"prefix {adapter_name!r} must be a KVPrefix, got {type(prefix).__name__}")
        if not isinstance(adapter_name, str) or not NAME.fullmatch(adapter_name):
            raise ValueError(f"adapter_name must be made of letters, digits, _ and -, got {adapter_name!r}")
        if adapter_name in self.prefixes:
            raise ValueError(f"adapter_name {adapter_name!r} is taken; delete_adapter removes that prefix")
        check_fit(prefix, find_decoder(self._model))
        self.prefixes[adapter_name] = prefix
        if adapter_name != self.active_adapter:
            prefix.requires_grad_(False)

    def set_adapter(self, adapter_name: str) -> None:
        """Make a prefix the active one, which rows read and which is trained; the others need no gradient.

        An optimiser has the parameters that it was made of: make another one after this.

        Raises:
            ValueError: there is none of that name; `unload` was called.
        """
        self._required()
        self._required_name(adapter_name)
        prefix = self.prefixes[adapter_name]
        if adapter_name != self.active_adapter:
            self.prefixes[self.active_adapter].requires_grad_(False)
            prefix.requires_grad_(True)
        self.active_adapter = adapter_name
        if not self._disabled:
            self._attach()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a prefix that is not active. Raises ValueError."""
        self._required_name(adapter_name)
        if adapter_name == self.active_adapter:
            raise ValueError(f"prefix {adapter_name!r} is active; set_adapter another one first")
        del self.prefixes[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model runs without a prefix."""
        if self._disabled:
            yield
            return
        self._required()
        self._disabled = True
        self._detach()
        try:
            yield
        finally:
            self._disabled = False
            self._attach()

    def get_base_model(self) -> PreTrainedModel:
        """The model itself, to which the prefix is attached."""
        return self._model

    def unload(self) -> PreTrainedModel:
        """Detach the prefix for good. Returns the model, which is as it was before."""
        self._unloaded = True
        self._frozen.close()
        return self._model

    def _attach(self) -> None:
        self._detach()
        attachment = self.prefixes[self.active_adapter].attach(self._model, backend=self.backend)
        self._attachment = self._attached.enter_context(attachment)

    def _detach(self) -> None:
        self._attachment = None
        self._attached.close()

    def _required_name(self, adapter_name: str) -> None:
        if adapter_name not in self.prefixes:
            raise ValueError(f"there is no prefix {adapter_name!r}; there are {', '.join(self.prefixes)}")

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of the parameters that are trained, and of all, those of the model included."""
        own = list(self.parameters())
        trained = sum(p.numel() for p in own if p.requires_grad)
        return trained, sum(p.numel() for p in (*own, *self._model.parameters()))

    def print_trainable_parameters(self) -> None:
        """Print these numbers as peft does."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    # files

    def save_pretrained(self, directory: str | os.PathLike, card: bool = True, is_main_process: bool = True) -> None:
        """Write the prefix "default" into `directory`, and each other one into a folder of its name in it.

        card: also write a model card beside each.  is_main_process: False writes nothing.  Raises as
        `KVPrefix.save_pretrained`.
        """
        if is_main_process:
            for name, prefix in self.prefixes.items():
                prefix.save_pretrained(Path(directory, "" if name == DEFAULT else name), card=card)

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        source: str | os.PathLike,
        adapter_name: str = DEFAULT,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        drop_p: float = 0.0,
        backend: str | None = None,
        allow_other_weights: bool = False,
    ) -> PrefixModel:
        """A model in eval mode with a saved prefix.

        Args:
            model: as for the class. If a `tokenizer` is given, the prefix is compared with it, too.
            source: a folder (of a prefix, an adapter, a run of `ctkernels tune`, a checkpoint of Trainer or accelerate)
                or its file, or else a repository of the hub.
            adapter_name: its name here. A checkpoint's prefixes keep theirs, and this one is active if it is there.
            subfolder, revision, token: where it is in that folder or repository, and the hub's own arguments.
            drop_p, backend: as for the class.
            allow_other_weights: as in `KVPrefix.from_pretrained`.

        Raises:
            PrefixFileError: what cannot be found, read or used, named.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}; source comes second")
        saved = read_prefixes(located(source, subfolder, revision, token), adapter_name)
        prefixes = {
            name: KVPrefix.from_parts(each, model, tokenizer, allow_other_weights) for name, each in saved.items()
        }
        if adapter_name in prefixes:
            prefixes = {adapter_name: prefixes.pop(adapter_name), **prefixes}
        return cls(model, prefixes, drop_p, backend).eval()

    def load_adapter(
        self,
        source: str | os.PathLike,
        adapter_name: str,
        *,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        allow_other_weights: bool = False,
    ) -> None:
        """Add a saved prefix, as `add_adapter` does. Arguments and errors as in `from_pretrained`."""
        path = located(source, subfolder, revision, token)
        (saved, *others) = read_prefixes(path, adapter_name).values()
        if others:
            raise PrefixFileError(f"{path}: holds several prefixes; PrefixModel.from_pretrained reads them")
        self.add_adapter(adapter_name, KVPrefix.from_parts(saved, self._model, None, allow_other_weights))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload prefix",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes to a repository of the hub, which is created if there is none.

        A README.md there that is not a card of ours stays. Arguments and errors are the hub's own.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            if api.file_exists(repo_id, "README.md", revision=revision):
                api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder)
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                allow_patterns=["README.md", FILE_NAME, "*/README.md", f"*/{FILE_NAME}"],
            )

    def get_extra_state(self) -> Tensor:
        """What the prefixes belong to, as JSON in bytes: safetensors hold tensors alone."""
        descriptions = {name: prefix.parts()[0] for name, prefix in self.prefixes.items()}
        return torch.tensor(list(json.dumps(descriptions).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Compare a state with the prefixes that are here. Raises ValueError if it is of others."""
        descriptions = described(state)
        if descriptions.keys() != self.prefixes.keys():
            raise ValueError(
                f"the state is of the prefixes {', '.join(descriptions)}; this model has {', '.join(self.prefixes)}"
            )
        for name, prefix in self.prefixes.items():
            metadata = PrefixMetadata(**descriptions[name]["metadata"])
            metadata.check(self._model)
            metadata.check_weights(self._model, f"the state's prefix {name!r}")
            first = descriptions[name]["first_position"]
            if first != prefix.first_position:
                raise ValueError(
                    f"rows of the state's prefix {name!r} begin at position {first}, here at {prefix.first_position}"
                )
            prefix.metadata = metadata

    # one module of two

    def train(self, mode: bool = True) -> PrefixModel:
        """Set the mode. Training mode drops prefix tokens and checkpoints gradients; the model's own dropout is off."""
        super().train(mode)
        if not self._unloaded:
            set_mode(self._model, recompute=mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> PrefixModel:
        """What `to`, `cuda` and the like call."""
        super()._apply(fn, recurse)
        self._model._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["_model"], name)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the model takes `num_items_in_batch`, for Trainer."""
        signature = inspect.signature(self._model.forward).parameters.values()
        return getattr(self._model, "accepts_loss_kwargs", any(p.kind == p.VAR_KEYWORD for p in signature))

    def _get_name(self) -> str:
        """The model's class, by which Trainer knows whose labels it has to shift for label smoothing."""
        return type(self._model).__name__

    def __repr__(self) -> str:
        return f"PrefixModel of {super().__repr__()}"

    def _replicate_for_data_parallel(self) -> Any:
        raise ValueError(
            "a PrefixModel has its model on one device, which nn.DataParallel does not copy; start one process per "
            "device (torchrun or accelerate launch), or show this one a single device (CUDA_VISIBLE_DEVICES)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixModel:
        prefixes = {name: copy.deepcopy(prefix, memo) for name, prefix in self.prefixes.items()}
        copied = PrefixModel(copy.deepcopy(self._model, memo), prefixes, self.drop_p, self.backend)
        copied.set_adapter(self.active_adapter)
        return copied.train(self.training)


@torch.compiler.disable
def _draw() -> int:
    """A seed of token dropout, of torch's generator."""
    return int(torch.randint(2**63 - 1, ()))


def _single(seed: int | Tensor) -> int:
    """The one seed of a batch, which a collator may have repeated for each row."""
    if not isinstance(seed, Tensor):
        return seed
    values = seed.flatten().unique().tolist()
    if len(values) != 1:
        raise ValueError(f"dropout_seed must be one integer for a batch, got {values[:8]}; row_ids tell rows apart")
    return values[0]
