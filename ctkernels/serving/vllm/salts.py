"""Which prefix a request reads: its `cache_salt`, which vLLM hashes into the names of all cached blocks of a request.

    ctkernels:P:CHECKSUM:NAME:SALT     P placeholder tokens stand in front of the prompt; SALT is the client's own

Blocks are shared by requests of one prefix, one content and one client's salt alone, whatever their token ids. NAME is
quoted as in the name of its file, so that it holds no colon.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

from ctkernels.tuning.storage import file_name

MARK = "ctkernels:"


@dataclass(frozen=True)
class Placed:
    """A prefix in front of a prompt. name: in the store.  length: P.  checksum: of its file.  salt: the client's."""

    name: str
    length: int
    checksum: str
    salt: str = ""

    def __str__(self) -> str:
        return f"{MARK}{self.length}:{self.checksum}:{file_name(self.name)}:{self.salt}"


def placed(salt: str | None) -> Placed | None:
    """What a salt says; None of one that is not ours.

    Raises:
        ValueError: it begins as ours do, and is none.
    """
    if salt is None or not salt.startswith(MARK):
        return None
    parts = salt.removeprefix(MARK).split(":", 3)
    if len(parts) != 4 or not parts[0].isdecimal() or int(parts[0]) < 1 or not all(parts[1:3]):
        raise ValueError(f"cache_salt begins with {MARK!r} but does not say which prefix it stands for: {salt[:60]!r}")
    return Placed(unquote(parts[2]), int(parts[0]), parts[1], parts[3])
