"""All settings of all methods, collected from the classes of options that the method table names.

SETTINGS        name -> type, neutral default, meaning, and the methods that read it: command line and documents use it
TrainSettings   one class with all of them, for whoever does not want to choose by method
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

from ctkernels.tuning.methods.table import TABLE
from ctkernels.tuning.train.options import Options, choices, declarer, meanings, neutral, type_hints


@dataclass(frozen=True)
class Setting:
    """A setting of one or more methods.

    kind: its type where it is declared; some methods take fewer choices.  default: the neutral one, which a method may
    replace by its own.  meaning: the entry of its docstring.  owner: the class that declares it.
    methods: names of those that read it.
    """

    name: str
    kind: Any
    default: Any
    meaning: str
    owner: type[Options]
    methods: tuple[str, ...]

    @property
    def readers(self) -> str:
        """Who reads it, in short: "" is all methods that train."""
        others = [m.name for m in TABLE if m.trains != "nothing" and m.name not in self.methods]
        if not others:
            return ""
        return ", ".join(self.methods) if len(self.methods) <= len(others) else f"not {', '.join(others)}"

    @property
    def defaults(self) -> str:
        """The commonest default, and the methods that have another one: `25; 8 (ttt, ttt+ct-kv)`."""
        by_value: dict[Any, list[str]] = {}
        for method in TABLE:
            if method.name in self.methods:
                by_value.setdefault(getattr(method.options(), self.name), []).append(method.name)
        (common, _), *others = sorted(by_value.items(), key=lambda item: -len(item[1]))
        return "; ".join([written(common), *(f"{written(value)} ({', '.join(names)})" for value, names in others)])


def written(value: Any) -> str:
    """The value of a setting, for people."""
    return "none" if value == () else str(value)


def _settings() -> dict[str, Setting]:
    """Every setting of the table's methods, those of most methods first.

    Raises:
        TypeError: two classes declare the same name, or one does not say what its setting means.
    """
    found: dict[str, Setting] = {}
    for method in TABLE:
        for name in (f.name for f in fields(method.options)):
            owner = declarer(method.options, name)
            if name not in meanings(owner):
                raise TypeError(f"the docstring of {owner.__name__} must say under Args: what {name} means")
            if name in found and found[name].owner is not owner:
                raise TypeError(f"{name} is declared twice, by {found[name].owner.__name__} and {owner.__name__}")
            kind = type_hints(owner)[name]
            if choices(kind) and None not in choices(kind):
                kind = Literal[choices(kind)]  # one of several
            readers = (*(found[name].methods if name in found else ()), method.name)
            found[name] = Setting(name, kind, neutral(owner, name), meanings(owner)[name], owner, readers)
    return dict(sorted(found.items(), key=lambda item: -len(item[1].methods)))


SETTINGS: dict[str, Setting] = _settings()

if TYPE_CHECKING:

    class TrainSettings(Options):
        """Made below from the table."""

        def __init__(self, **settings: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

else:

    def _parts(cls: type[Options]) -> tuple[type[Options], ...]:
        return tuple(dict.fromkeys(part for method in TABLE for part in method.options.parts()))

    TrainSettings = make_dataclass(
        "TrainSettings",
        [(s.name, s.kind, field(default=s.default)) for s in SETTINGS.values()],
        bases=(Options,),
        frozen=True,
        namespace={
            "__module__": __name__,
            "parts": classmethod(_parts),
            "__doc__": "Settings of any method. What a method does not read must stay at its default; a method's own\n"
            "defaults come from `METHODS[name].settings()`.\n\nArgs:\n"
            + "\n".join(f"    {s.name}: {s.meaning}" for s in SETTINGS.values())
            + "\n\nRaises:\n    ValueError: a value out of its range.\n",
        },
    )
