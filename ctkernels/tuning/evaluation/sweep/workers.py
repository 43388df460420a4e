"""The processes of a sweep. Each takes the next cell when it has finished one.

Under `torchrun` (or `accelerate launch`) the processes share a counter in their rendezvous store. Otherwise there is
one process. All processes must see the same OUT folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count

import torch.distributed as dist

PATIENCE = timedelta(days=30)  # how long a process that has finished waits for the cells of the others


class Workers:
    """This process among those of the sweep.

    rank: its number.  size: the number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._sequences = 0
        self._store: dist.Store | None = None
        if self.size > 1:
            store, self.rank, self.size = next(iter(dist.rendezvous("env://")))
            groups = dist.PrefixStore("group", store)
            dist.init_process_group("gloo", store=groups, rank=self.rank, world_size=self.size, timeout=PATIENCE)
            # after a restart the count begins at 0 again
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"cells{attempt}", store)

    def numbers(self) -> Iterator[int]:
        """0, 1, 2, ... without end. Each number goes to one process only.

        A call begins a new sequence. All processes must make the same calls.
        """
        self._sequences += 1
        if self._store is None:
            yield from count()
        while True:
            yield self._store.add(f"taken{self._sequences}", 1) - 1

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return when all processes have called it. Until then, call `meanwhile` every 0.2 seconds."""
        if self.size == 1:
            return
        work = dist.barrier(async_op=True)
        while not work.is_completed():
            meanwhile()
            time.sleep(0.2)
        work.wait()

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()
