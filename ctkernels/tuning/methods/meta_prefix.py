"""A prefix that is trained over several tasks at once, for a new task to start from.

As in MetaICL (Min and others: "Learning to Learn In Context", arXiv 2110.15943), a row is some demonstrations of one
task in words and then one more pair of it, drawn anew each epoch; here a prefix is trained instead of the weights. With
`start_from`, ct-kv puts it in front of a new task's demonstrations, as it stood in front of those of the source tasks.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import PairEncoder, Row
from ctkernels.tuning.data.retrieval import Demonstrate, InWordsEncoder
from ctkernels.tuning.hf.embeddings import mean_states
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.icl_words import InWords
from ctkernels.tuning.methods.prefix_tuning import PrefixTuningOptions
from ctkernels.tuning.methods.starts import tokens_prefix
from ctkernels.tuning.train.learners import PrefixLearner

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MetaPrefixOptions(InWords, PrefixTuningOptions):
    """What meta-prefix reads."""

    demonstrate: Demonstrate = "random"
    batch_rows: int | None = 4


class TasksLearner(PrefixLearner):
    """Trains a prefix on rows that `draw` makes for each epoch."""

    def __init__(
        self,
        model: "PreTrainedModel",
        prefix: KVPrefix,
        draw: Callable[[int], Sequence[Row]],
        settings: MetaPrefixOptions,
    ) -> None:
        super().__init__(model, prefix, draw(0), settings)
        self._draw = draw if settings.demonstrate == "random" else None

    def rows(self, epoch: int) -> Sequence[Row]:
        return self._rows if self._draw is None else self._draw(epoch)


def by_task(demonstrations: Sequence[Demonstration]) -> dict[str, list[Demonstration]]:
    """The demonstrations of each task, in order. Warns if none names a task: all of them are one task then.

    Raises:
        DataError: some name a task and others do not; a task with a single demonstration.
    """
    tasks: dict[str, list[Demonstration]] = {}
    for pair in demonstrations:
        tasks.setdefault(pair.task or "", []).append(pair)
    if "" in tasks and len(tasks) > 1:
        raise DataError(
            f"{tasks[''][0].source or repr(tasks[''][0].input[:30])}: the field 'task' is missing, and other "
            "demonstrations have it; meta-prefix needs it of all"
        )
    if "" in tasks:
        warnings.warn(
            "meta-prefix trains over several tasks, but no demonstration names its task: all of them count as one",
            stacklevel=2,
        )
    for name, pairs in tasks.items():
        if len(pairs) < 2:
            raise DataError(f"task {name!r} has 1 demonstration, and meta-prefix needs at least 2 of each task")
    return tasks


def draw_rows(run: Run[MetaPrefixOptions], tasks: dict[str, list[Demonstration]], epoch: int) -> list[Row]:
    """One row for each demonstration: `x _ y` behind others of its task in words, without a delimiter in front."""
    settings, rows = run.settings, []
    leads = 0 if run.text_format.instruction else 1
    for pairs in tasks.values():
        encoder = InWordsEncoder(
            run.tokenizer,
            run.text_format,
            pairs,
            settings.shown,
            settings.demonstrate,
            settings.dropout_seed(epoch),
            partial(mean_states, run.model),
        )
        encoded = replace(run, demonstrations=tuple(pairs)).encode_rows(encoder)
        rows += [replace(row, tokens=row.tokens[leads:], held_out=-1) for row in encoded]
    return rows


def longest_rows(run: Run[MetaPrefixOptions], tasks: dict[str, list[Demonstration]]) -> list[Row]:
    """A row of each task as long as any that an epoch could draw: its longest pairs, and the longest again."""
    encoder, rows = PairEncoder(run.tokenizer, run.text_format), []
    for pairs in tasks.values():
        sizes = []
        for pair in pairs:
            answer = encoder.answer(pair, pair.output)
            sizes.append(len(encoder.prompt(pair, len(answer))) + len(answer) + 1)
        sizes.sort()
        length = sum(sizes[-run.settings.shown :]) + sizes[-1]
        rows.append(Row((0,) * length, ((0,),), source=pairs[0].source))
    return rows


def fit(run: Run[MetaPrefixOptions]) -> Adapter:
    PrefixLearner.check(run.model, run.settings)
    tasks = by_task(run.demonstrations)
    prefix = tokens_prefix(run)
    draw = partial(draw_rows, run, tasks)
    run.check_rows(prefix.first_position, draw(0))
    if run.settings.demonstrate == "random":
        run.check_rows(prefix.first_position, longest_rows(run, tasks))
    learner = TasksLearner(run.model, prefix, draw, run.settings)
    run.train(learner, result=lambda: Adapter(learner.current()))
    return Adapter(learner.result())


META_PREFIX = Method(
    name="meta-prefix",
    summary="a prefix trained over several tasks, for others to start from",
    options=MetaPrefixOptions,
    fit=fit,
    trains="prefix",
    transfers="prefix",
    needs_demonstrations=2,
)
