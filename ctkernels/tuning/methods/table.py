"""The method table. A new method is one file beside this one and one row here (docs/guides/extend.md)."""

from __future__ import annotations

import difflib
from typing import Any

from ctkernels.tuning.methods.base import Method
from ctkernels.tuning.methods.cpt import CPT
from ctkernels.tuning.methods.ct_kv import CT_KV
from ctkernels.tuning.methods.ct_prompt import CT_PROMPT
from ctkernels.tuning.methods.deep_thinking import DEEP_THINKING
from ctkernels.tuning.methods.icl import ICL
from ctkernels.tuning.methods.icl_words import ICL_WORDS
from ctkernels.tuning.methods.ipt import IPT
from ctkernels.tuning.methods.meta_prefix import META_PREFIX
from ctkernels.tuning.methods.prefix_tuning import PREFIX_TUNING
from ctkernels.tuning.methods.prompt_tuning import PROMPT_TUNING
from ctkernels.tuning.methods.ttt import TTT
from ctkernels.tuning.methods.ttt_ct_kv import TTT_CT_KV
from ctkernels.tuning.methods.zero_shot import ZERO_SHOT

TABLE = (
    ZERO_SHOT,
    ICL,
    ICL_WORDS,
    PROMPT_TUNING,
    PREFIX_TUNING,
    META_PREFIX,
    IPT,
    CT_PROMPT,
    CT_KV,
    TTT,
    TTT_CT_KV,
    DEEP_THINKING,
    CPT,
)
METHODS: dict[str, Method[Any]] = {method.name: method for method in TABLE}


def get_method(name: str) -> Method[Any]:
    """The method of that name.

    Raises:
        ValueError: no such method; the message lists them and suggests the nearest.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}{hint}")
    return METHODS[name]
