"""Several processes that tune one adapter: each runs its share of the rows of a step, gradients are summed once a step.

    rank 0   rows 0 2 4 ─┐                               ┌─ the same step of AdamW
    rank 1   rows 1 3   ─┴─ loss summed, gradient summed ─┴─ on the same bits

What a row drops depends on its index among all rows, and a loss is divided by the number of the step's rows, not of a
share's: the result is that of one process up to the order of sums.

Every exchange begins with a vote on whether anybody has failed. A process that fails anywhere else takes part in that
vote before its error leaves `together`, so that the others stop with a PeerError where they would wait for ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ctkernels.tuning.storage import locked

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class PeerError(ConnectionError):
    """Another process of the run failed or is gone; the message says which one, and with what, if it could tell."""


class Ranks:
    """The processes that share the rows of a run.

    Args:
        group: their process group; None is this process alone, whatever groups there are.
        device: where what is exchanged lies, one that the group's backend serves.
        sharded: the processes also hold parts of one model, so that they meet in every forward pass. One that fails
            then just ends, and takes the others with it: they wait for it in the model, not in a vote.

    rank, size: this process's number and how many there are.

    Raises:
        TypeError: not a process group, or one that this process is not in.
    """

    def __init__(
        self, group: ProcessGroup | None = None, device: torch.device | str = "cpu", sharded: bool = False
    ) -> None:
        self.rank, self.size, self._group, self._device, self._sharded = 0, 1, group, device, sharded
        if group is None:
            return
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group must be a process group of torch.distributed that this process is in, or None, "
                f"got {type(group).__name__}"
            )
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return dist.get_rank() == 0 if self._sharded and dist.is_initialized() else self.rank == 0

    def share(self, step: Sequence[T], rank: int | None = None) -> list[T]:
        """What of a step is run by `rank` (default: this one)."""
        return list(step[self.rank if rank is None else rank :: self.size])

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes enter and leave: if one of them raises in it, all do.

        Raises:
            PeerError: another process raised.
        """
        try:
            yield
            self._vote()
        except PeerError:
            raise
        except Exception as error:
            if not self._sharded:
                with suppress(PeerError):  # the others are gone, too
                    self._vote(error)
            raise

    def agree(self, **values: object) -> None:
        """Refuse to go on where the processes hold different values.

        Raises:
            ValueError: the names of what differs; on all processes.
        """
        if self.size == 1:
            return
        self._vote()
        theirs: list[dict[str, object]] = [{}] * self.size
        with _contact():
            dist.all_gather_object(theirs, values, self._group)
        for name in values:
            if any(other[name] != theirs[0][name] for other in theirs):
                raise ValueError(
                    f"all processes of a run must have the same {name}, got {[other[name] for other in theirs]}"
                )

    def share_start(self, parameters: Iterable[Tensor]) -> None:
        """Give every process the values of the first one."""
        if self.size == 1:
            return
        self._vote()
        with _contact():
            for parameter in parameters:
                dist.broadcast(parameter.detach(), group=self._group, group_src=0)

    def sum(self, parameters: Iterable[nn.Parameter], total: Tensor) -> Tensor:
        """Sum the gradients, in place, and a number, fp64 `[]`; every process gets the same bits."""
        if self.size == 1:
            return total
        total = self._vote(total=total)
        alike: dict[tuple, list[nn.Parameter]] = {}
        for parameter in parameters:
            alike.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for same in alike.values():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in same]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            with _contact():
                dist.all_reduce(flat, group=self._group)
            for parameter, part in zip(same, flat.split([p.numel() for p in same]), strict=True):
                parameter.grad = part.view_as(parameter)
        return total

    def first(self, value: float) -> float:
        """The first process's number, for all of them."""
        return float(self.sum((), torch.tensor(value if self.rank == 0 else 0.0, dtype=torch.float64)))

    def _vote(self, error: Exception | None = None, total: Tensor | None = None) -> Tensor:
        """Tell each other who failed; returns the sum of `total`. Raises PeerError where another one did."""
        total = torch.zeros((), dtype=torch.float64) if total is None else total
        if self.size == 1:
            return total
        ballot = torch.stack((torch.tensor(float(error is not None), device=total.device).double(), total.double()))
        ballot = ballot.to(self._device)
        reports: list[str | None] = [None] * self.size
        with _contact():
            dist.all_reduce(ballot, group=self._group)
            if not ballot[0]:
                return ballot[1].to(total.device)
            dist.all_gather_object(reports, None if error is None else f"{type(error).__name__}: {error}", self._group)
        failures = "; ".join(f"rank {rank}: {report}" for rank, report in enumerate(reports) if report is not None)
        if error is None:
            raise PeerError(f"another process failed, {failures}")
        return total


@contextmanager
def _contact() -> Iterator[None]:
    """What a broken connection raises, as a PeerError."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(f"lost contact with the other processes: {error}") from error


def is_sharded(model: nn.Module) -> bool:
    """Whether other processes hold parts of the model's weights (FSDP2, tensor parallelism)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local_device(name: str) -> str:
    """The device of this process among those of its machine: `cuda` becomes the GPU of its local rank."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" and torch.cuda.is_available() else name


@contextmanager
def folder_of_run(folder: str | os.PathLike) -> Iterator[None]:
    """A block in which a run alone writes into its folder: the first of its processes holds the lock (see `locked`)."""
    first = int(os.environ.get("WORLD_SIZE", 1)) == 1 or int(os.environ.get("RANK", 0)) == 0
    with locked(folder) if first else nullcontext():
        yield


@contextmanager
def launched(device: str) -> Iterator[ProcessGroup | None]:
    """The group of all processes that a launcher (torchrun, accelerate launch) started with this one; None if it is
    alone. It is left at the end of the block.

    device: what this process computes on.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield None
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
