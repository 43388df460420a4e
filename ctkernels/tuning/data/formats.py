"""Text formats: how pairs become tokens, as one context and as rows that read it.

`_` is the delimiter, which is one token. x and y are tokenised apart, so no token crosses a border:

    context        x0 _ y0  _ x1 _ y1  _ x2 _ y2        a row of demonstration 1:   _ x1 _ y1
    segments      |        |          |          |      its labels:                        y1

An instruction stands before all demonstrations and belongs to none. A template puts text of its own around x, in the
place of the delimiter between x and y:     I _ Q: x0 A: y0 _ Q: x1 A: y1
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ctkernels.tuning.data.demonstrations import DataError, Demonstration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL, DELIMITER, INPUT, OUTPUT = range(4)  # kinds of context tokens
Tokens = tuple[int, ...]
Score = Literal["mean", "sum", "first-token"]  # of an option: what its tokens' log-likelihoods are made into
Choices = Literal["none", "optional", "required"]  # whether training rows hold the options of their demonstrations


@dataclass(frozen=True)
class TextFormat:
    """How pairs become tokens.

    Args:
        delimiter: text between input and output, and between pairs; exactly one token.
        max_pair_tokens: most tokens of one pair (input, delimiter, output). The end of a longer input is cut off.
        bos: whether a sequence starts with the tokenizer's BOS token. None: as the tokenizer does by itself.
        instruction: text before all demonstrations, which no row has hidden from it; a delimiter follows it.
        template: text around an input and before an output, such as "Q: {input}\\nA: {output}"; without it the
            delimiter stands between them. It is tokenised together with the input, and ends with {output}.
    """

    delimiter: str = " "
    max_pair_tokens: int = 256
    bos: bool | None = None
    instruction: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        if self.max_pair_tokens < 3:
            raise ValueError(f"max_pair_tokens must be at least 3, got {self.max_pair_tokens}")
        _, found, rest = self.template.partition("{input}")
        if self.template and (not found or "{input}" in rest or rest.find("{output}") != len(rest) - len("{output}")):
            raise ValueError(
                f"template must hold {{input}} once and end with {{output}}, such as 'Q: {{input}} A: {{output}}', got "
                f"{self.template!r}"
            )
        if self.template and rest == "{output}":
            raise ValueError(f"template must have text between {{input}} and {{output}}, got {self.template!r}")

    def around(self, text: str) -> tuple[str, str]:
        """An input with the template's text before it, and the template's text after it."""
        before, _, after = self.template.partition("{input}")
        return before + text, after.removesuffix("{output}")

    @property
    def recorded(self) -> dict[str, Any]:
        """Its fields as JSON values; what earlier versions did not have only where it is not empty."""
        found = asdict(self)
        return {name: value for name, value in found.items() if value or name not in ("instruction", "template")}


@dataclass(frozen=True)
class EncodedContext:
    """The concatenated demonstrations.

    input_ids: int64 [P].
    segments: int64 [K+1]. Demonstration i is `input_ids[segments[i]:segments[i + 1]]`, with its leading delimiter. A
        BOS token and an instruction are before the first segment, so no row hides them.
    kinds: int64 [P], the kind of each token: SPECIAL, DELIMITER, INPUT or OUTPUT.
    """

    input_ids: Tensor
    segments: Tensor
    kinds: Tensor


@dataclass(frozen=True)
class Choice:
    """The options of a demonstration whose output is in a row: continuations of the tokens before that output.

    at: index of the output's first token among the row's labels.
    options: tokens of each option, of which the score reads the log-likelihoods.
    output: tokens of the output, all of which are labels.
    right: indices of the right options.
    """

    at: int
    options: tuple[Tokens, ...]
    output: Tokens
    right: tuple[int, ...]

    def branches(self) -> list[Tokens]:
        """What has to be run besides the row itself: options without their last token, which predicts nothing, each
        once, and not those that the output begins with."""
        starts = dict.fromkeys(option[:-1] for option in self.options)
        return [start for start in starts if not self.in_row(start)]

    def in_row(self, start: Tokens) -> bool:
        """Whether the row's own labels tell what follows `start`."""
        return len(start) < len(self.output) and self.output[: len(start)] == start


@dataclass(frozen=True)
class Row:
    """One sequence that reads the prefix, and the answers to score in it.

    tokens: what the model reads: the prompt, and the answer without its last token, which predicts nothing.
    answers: token lists that differ only in their last token, so that one run scores all of them.
    held_out: the demonstration that this row must not see, or -1.
    source: where the row comes from; used only in messages.
    predicted_at: for each token of an answer, the index of the token whose logits predict it. None: the answer is
        at the end of the row. Answers of several demonstrations in one sequence are one answer with gaps between its
        tokens.
    choices: the options of the demonstrations whose outputs are labels of its one answer, where they are wanted.
    """

    tokens: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    held_out: int = -1
    source: str | None = None
    predicted_at: tuple[int, ...] | None = None
    choices: tuple[Choice, ...] = ()

    @property
    def branches(self) -> list[tuple[int, Tokens]]:
        """What its choices need to be run besides it: how many of its tokens a branch follows, and its own tokens."""
        positions = self.label_positions(0) if self.choices else ()
        return [(positions[choice.at] + 1, tokens) for choice in self.choices for tokens in choice.branches()]

    @property
    def first_label(self) -> int:
        """Index of the token whose logits predict the first answer token."""
        return len(self.tokens) - len(self.answers[0])

    def label_positions(self, answer: int) -> tuple[int, ...]:
        """Index of the token whose logits predict each token of an answer."""
        if self.predicted_at is not None:
            return self.predicted_at
        return tuple(range(self.first_label, self.first_label + len(self.answers[answer])))

    def example(self) -> dict[str, Any]:
        """The row as columns of a dataset, for `PrefixModel`: `input_ids`, `labels` (-100 where there is none, not
        shifted, as transformers wants them) and `held_out`. Raises ValueError if it has several answers."""
        if len(self.answers) != 1:
            raise ValueError(f"a row must have one answer to be an example, got {len(self.answers)}")
        input_ids = [*self.tokens, self.answers[0][-1]]
        labels = [-100] * len(input_ids)
        for position, token in zip(self.label_positions(0), self.answers[0], strict=True):
            labels[position + 1] = token
        return {"input_ids": input_ids, "labels": labels, "held_out": self.held_out}


def start_tokens(tokenizer: PreTrainedTokenizerBase, text_format: TextFormat) -> tuple[int, ...]:
    """What a sequence starts with: BOS, or nothing. Raises ValueError: `bos=True` for a tokenizer without BOS."""
    bos, use_bos = tokenizer.bos_token_id, text_format.bos
    if use_bos and bos is None:
        raise ValueError("bos=True, but the tokenizer has no BOS token")
    if use_bos is None:
        use_bos = bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]
    return (bos,) if use_bos else ()


class PairEncoder:
    """The tokens of pairs under one tokenizer and one `TextFormat`.

    Raises:
        ValueError: the delimiter is not exactly one known token, or `bos=True` for a tokenizer without BOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat | None = None) -> None:
        self.tokenizer = tokenizer
        self.format = text_format or TextFormat()
        self.cut_sources: list[str] = []
        delimiter = self.encode(self.format.delimiter)
        if len(delimiter) != 1 or delimiter[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"delimiter must be exactly one token; this tokenizer turns {self.format.delimiter!r} into "
                f"{delimiter}; choose another delimiter, such as '\\n'"
            )
        self.delimiter = delimiter[0]
        self.bos = start_tokens(tokenizer, self.format)
        self.start = self.bos + (self.encode(self.format.instruction) if self.format.instruction else ())
        self.leads = bool(self.format.instruction)  # whether the first pair, too, has a delimiter before it
        self.closing = 0 if self.format.template else 1  # delimiters at the end of a prompt

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text, without special tokens."""
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def answer(self, demonstration: Demonstration, output: str) -> tuple[int, ...]:
        """Tokens of an output or option."""
        tokens = self.encode(output)
        if not tokens:
            raise DataError(f"{_place(demonstration)}the output {output!r} has no tokens under this tokenizer")
        if len(tokens) > self.format.max_pair_tokens - 2:
            raise DataError(
                f"{_place(demonstration)}the output alone has {len(tokens)} tokens; with max_pair_tokens="
                f"{self.format.max_pair_tokens} no room is left for the input"
            )
        return tokens

    def prompt(self, demonstration: Demonstration, longest_answer: int) -> tuple[int, ...]:
        """Tokens of the input and the delimiter after it (or the template around it), the input cut to leave room for
        `longest_answer` tokens."""
        tokens = self.encode(demonstration.input)
        if not tokens and not demonstration.may_be_blank:
            raise DataError(
                f"{_place(demonstration)}the input {demonstration.input!r} has no tokens under this tokenizer"
            )
        after: Tokens = (self.delimiter,)
        if self.format.template:
            before, end = self.format.around(demonstration.input)
            whole, after = self.encode(before + end), self.encode(end)
            if len(whole) + longest_answer <= self.format.max_pair_tokens:
                return whole
            tokens = self.encode(before)
        room = self.format.max_pair_tokens - longest_answer - len(after)
        if room < 1:
            raise DataError(
                f"{_place(demonstration)}max_pair_tokens={self.format.max_pair_tokens} leaves no room for an input "
                f"before {longest_answer} tokens"
            )
        if len(tokens) > room:
            self.cut_sources.append(demonstration.source or repr(demonstration.input[:30]))
        return (*tokens[:room], *after)

    def options(self, demonstration: Demonstration, score: Score = "mean") -> dict[str, Tokens]:
        """The tokens of each option that `score` reads.

        Raises:
            DataError: options whose tokens are the same.
        """
        found: dict[str, Tokens] = {}
        seen: dict[Tokens, str] = {}
        for option in demonstration.options or ():
            tokens = self.answer(demonstration, option)
            tokens = tokens[:1] if score == "first-token" else tokens
            if tokens in seen:
                how = "begin with the same token" if score == "first-token" else "are the same tokens"
                raise DataError(
                    f"{_place(demonstration) or repr(demonstration.input[:30]) + ': '}the options {seen[tokens]!r} and "
                    f"{option!r} {how} under this tokenizer"
                )
            found[option], seen[tokens] = tokens, option
        return found

    def longest(self, demonstration: Demonstration, answer: Tokens, choices: Choices) -> int:
        """Most tokens that follow the input: of the output, or of the longest option where choices are wanted."""
        options = (demonstration.options or ()) if choices != "none" else ()
        return max([len(answer), *(len(self.answer(demonstration, option)) for option in options)])

    def choice(
        self, demonstration: Demonstration, answer: Tokens, at: int, choices: Choices, score: Score
    ) -> tuple[Choice, ...]:
        """The choice of a demonstration whose output's first token is label `at` of a row; none if it has no options.

        Raises:
            DataError: choices are required, and it has no options.
        """
        if choices == "none" or (choices == "optional" and not demonstration.options):
            return ()
        if not demonstration.options:
            raise DataError(
                f"{_place(demonstration) or repr(demonstration.input[:30]) + ': '}this objective needs options to "
                "choose from, and the demonstration has none; add them, or choose the objective mixed or answers"
            )
        options = self.options(demonstration, score)
        right = tuple(i for i, option in enumerate(options) if option in demonstration.right)
        return (Choice(at, tuple(options.values()), answer, right),)

    def report_cuts(self) -> None:
        """Warn about the inputs that were cut since the last call."""
        if self.cut_sources:
            shown = ", ".join(self.cut_sources[:5]) + (", ..." if len(self.cut_sources) > 5 else "")
            warnings.warn(
                f"{len(self.cut_sources)} inputs lost their end to keep a pair within "
                f"{self.format.max_pair_tokens} tokens: {shown}",
                stacklevel=3,
            )
            self.cut_sources.clear()


def encode_context(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    text_format: TextFormat | None = None,
) -> EncodedContext:
    """The demonstrations as one context. Without demonstrations it is BOS and the instruction, or empty.

    Raises:
        DataError: an input or output without tokens, or an output that leaves no room for its input.
        ValueError: the delimiter is not one token.
    """
    encoder = PairEncoder(tokenizer, text_format)
    tokens, kinds = list(encoder.start), [SPECIAL] * len(encoder.start)
    closing = encoder.closing
    segments = [len(tokens)]
    for i, demonstration in enumerate(demonstrations):
        answer = encoder.answer(demonstration, demonstration.output)
        prompt = encoder.prompt(demonstration, len(answer))
        lead = (encoder.delimiter,) if i > 0 or encoder.leads else ()
        tokens += lead + prompt + answer
        kinds += [DELIMITER] * len(lead) + [INPUT] * (len(prompt) - closing) + [DELIMITER] * closing
        kinds += [OUTPUT] * len(answer)
        segments.append(len(tokens))
    encoder.report_cuts()
    return EncodedContext(
        torch.tensor(tokens, dtype=torch.long), torch.tensor(segments), torch.tensor(kinds, dtype=torch.long)
    )


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    text_format: TextFormat | None = None,
    learn_stop: bool = False,
    encoder: PairEncoder | None = None,
    choices: Choices = "none",
    score: Score = "mean",
) -> list[Row]:
    """Training rows, one per demonstration: `_ x _ y`, with y as labels.

    Args:
        learn_stop: the delimiter after the answer is a label, too, so that the model learns where an answer ends.
        encoder: used instead of a `PairEncoder`; for instance one that shows demonstrations before an input.
        choices: whether rows hold the options of their demonstrations; an input is cut to leave room for the longest.
        score: what is read of an option.

    Raises:
        DataError, ValueError: as `encode_context`; choices are required, and a demonstration has no options.
    """
    encoder = encoder or PairEncoder(tokenizer, text_format)
    rows = []
    for i, demonstration in enumerate(demonstrations):
        answer = encoder.answer(demonstration, demonstration.output)
        prompt = (encoder.delimiter, *encoder.prompt(demonstration, encoder.longest(demonstration, answer, choices)))
        labels = (*answer, encoder.delimiter) if learn_stop else answer
        choice = encoder.choice(demonstration, answer, 0, choices, score)
        rows.append(Row(prompt + labels[:-1], (labels,), held_out=i, source=demonstration.source, choices=choice))
    encoder.report_cuts()
    return rows


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, text_format: TextFormat | None = None) -> list[int]:
    """Token ids `_ x _` of an input after a prefix, as training rows begin.

    Text and delimiters are tokenised apart, so that a space does not become part of the first word. Nothing is cut.

    Raises:
        ValueError: the delimiter is not one token.
    """
    encoder = PairEncoder(tokenizer, text_format)
    if encoder.format.template:
        return [encoder.delimiter, *encoder.encode("".join(encoder.format.around(text)))]
    return [encoder.delimiter, *encoder.encode(text), encoder.delimiter]


def _place(demonstration: Demonstration) -> str:
    return f"{demonstration.source}: " if demonstration.source else ""
