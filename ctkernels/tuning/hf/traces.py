"""What attaching leaves on a model: undone when it ends, and taken off copies that are made meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Traces(ExitStack):
    """An `ExitStack` whose entries can also be undone on a deep copy of the objects that they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self._undo: list[tuple[Any, Callable[[Any], Any]]] = []  # an object, and what undoes its change on a copy of it

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute, which is as it was before in the end."""
        own = vars(module)
        if name in own:
            before = own[name]
            self.callback(setattr, module, name, before)
            self.on_copy(module, lambda copied: vars(copied).update({name: before}))
        else:
            self.callback(delattr, module, name)
        setattr(module, name, value)

    def hook(self, handle: RemovableHandle) -> None:
        """Remove a hook in the end."""
        self.callback(handle.remove)
        for hooks in (handle.hooks_dict_ref(), *(extra() for extra in handle.extra_dict_ref)):
            self.on_copy(hooks, lambda copied: copied.pop(handle.id, None))

    def callback(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if function is delattr:
            holder, name = args
            self.on_copy(holder, lambda copied: vars(copied).pop(name, None))
        return super().callback(function, *args, **kwargs)

    def on_copy(self, original: Any, undo: Callable[[Any], Any]) -> None:
        """Have `undo` called with a deep copy of `original`."""
        self._undo.append((original, undo))

    def pop_all(self) -> Traces:
        kept = super().pop_all()
        kept._undo = self._undo
        return kept

    def plain_copy(self, attachment: Any, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """A deep copy of `module` as it was before. Becomes its `__deepcopy__`."""
        memo[id(attachment)] = attachment  # hooks refer to it until they are taken off
        kind = type(module)
        copied = memo[id(module)] = kind.__new__(kind)
        for name, value in vars(module).items():
            if name != "__deepcopy__":
                vars(copied)[name] = copy.deepcopy(value, memo)
        for original, undo in self._undo:
            if id(original) in memo:
                undo(memo[id(original)])
        return copied
