"""Several KV prefixes of one model in one pass: every row reads its own task's.

rows            a0 a1 a2 b0 b1          three rows of task a, two of task b, packed into one sequence
prefix_index     0  0  0  1  1
prefixes        [2, Hk, P, D]           put together by every pass, so that a gradient goes to its own prefix
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ctkernels.tuning.adapters.prefix_set import PrefixSet
from ctkernels.tuning.data.batches import Batch
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.objectives import Forward
from ctkernels.tuning.train.learners.prefix import PrefixLearner
from ctkernels.tuning.train.masks import Rows, side_by_side


class PrefixLearners:
    """What `PrefixLearner` is for the passes of one prefix, for those of several; each stays a learner of its own.

    learners: of one model.
    """

    def __init__(self, learners: Sequence[PrefixLearner]) -> None:
        self.learners, self.model = learners, learners[0].model
        self._prefixes = PrefixSet([learner.module for learner in learners], trainable=True)
        self._longest = max(learner.prefix.length for learner in learners)

    @contextmanager
    def attached(self, backend: str | None) -> Iterator[None]:
        """The block in which `forward` is called and run; the model is as it was after it."""
        with Attachment(self._prefixes, self.model, backend=backend) as self._attachment:
            yield

    def forward(self, batch: Batch, owners: Sequence[int], seeds: Sequence[int]) -> Forward:
        """A batch ready to run.

        owners: the learner of each row; never decreases.  seeds: one for each learner, of what it draws.
        """
        present = sorted(set(owners))
        counts = [owners.count(number) for number in present]
        rows = zip(batch.row_ids.split(counts), batch.held_out.split(counts), strict=True)
        masks = [self.learners[n].mask(Rows(*own), seeds[n]) for n, own in zip(present, rows, strict=True)]
        self._attachment.mask = side_by_side(masks, counts, self._longest)
        self._attachment.prefix_index = torch.tensor(owners, device=batch.row_ids.device)
        return Forward(self.model, self._attachment, batch)
