"""A tokenizer and a task that the tests build on the spot: one token per character, so that all tokens are known."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ctkernels.tuning.data.demonstrations import Demonstration

CHARACTERS = string.ascii_lowercase + string.digits + " .?"
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
IDS = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}  # 43 tokens, within every tiny model's vocabulary
SPACE, BOS, EOS = IDS[" "], IDS["<bos>"], IDS["<eos>"]

DEMONSTRATIONS = [
    Demonstration("red brick", "warm", ("warm", "cold", "ok")),
    Demonstration("snow", "cold", ("warm", "cold", "ok")),
    Demonstration("a log fire", "ok", ("warm", "cold", "ok")),
    Demonstration("ice", "cold", ("warm", "cold", "ok")),
    Demonstration("noon in july", "warm", ("warm", "cold", "ok")),
]


def char_tokenizer(adds_bos: bool = False, drops_spaces: bool = False) -> PreTrainedTokenizerFast:
    """One token per character; with `adds_bos` texts start with BOS, with `drops_spaces` a space has no token."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    steps = [pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")]
    if drops_spaces:
        steps.insert(0, pre_tokenizers.WhitespaceSplit())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def ids(text: str) -> tuple[int, ...]:
    """Tokens of a text, with `_` for the space."""
    return tuple(IDS[c] for c in text.replace("_", " "))


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    """Demonstrations, other JSON values or raw lines, one a line."""
    lines = []
    for record in records:
        if isinstance(record, Demonstration):
            record = {"input": record.input, "output": record.output, "options": record.options}
        lines.append(record if isinstance(record, str) else json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return path
