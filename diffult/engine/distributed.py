"""Several processes in one training, started by torchrun; with one process everything here does nothing."""

from __future__ import annotations

import atexit
import datetime
import gc
import itertools
import logging
import os
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from diffult.errors import UserError, first_line

T = TypeVar("T")
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


@dataclass(frozen=True)
class World:
    """This process among all: 0 <= rank < size."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All processes, for exchanges; None for one alone."""
        return dist.group.WORLD if self.size > 1 else None

    def local_slice(self, count: int, what: str) -> slice:
        """This process's share of `count` samples; shares are equal and in order of rank.

        Raises:
            UserError: the number of processes does not divide the count.
        """
        if count % self.size:
            raise UserError(f"{what} = {count} cannot be shared by {self.size} processes; make it a multiple")
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum_(self, x: torch.Tensor) -> None:
        """Replaces x by its sum over the processes, in place; the same bits on each."""
        if self.size > 1:
            dist.all_reduce(x)

    def average_(self, x: torch.Tensor) -> None:
        """Replaces x by its mean over the processes, in place; the same bits on each."""
        if self.size > 1:
            dist.all_reduce(x)
            x.div_(self.size)

    def stack(self, x: torch.Tensor) -> torch.Tensor:
        """The x of every process, [size, *x.shape] in order of rank; gradients flow back to where each came from."""
        if self.size == 1:
            return x[None]
        places = torch.arange(self.size, device=x.device).view(-1, *[1] * x.ndim)
        return _Sum.apply(torch.where(places == self.rank, x, 0.0))

    def gather(self, mine: T) -> list[T]:
        """The objects of every process in order of rank, on each of them, however long one takes to get here."""
        if self.size == 1:
            return [mine]
        everyone: list[T] = [mine] * self.size
        dist.all_gather_object(everyone, mine, group=_patient)
        return everyone

    def store(self) -> dist.Store:
        """A new table of keys and values that all processes share: they call this equally often. Several only."""
        return dist.PrefixStore(f"table-{next(_TABLES)}", dist.distributed_c10d._get_default_store())

    def barrier(self) -> None:
        """Returns once every process has called it, however long one takes to get here."""
        if self.size > 1:
            dist.barrier(group=_patient)


class Arrivals:
    """Which processes have come to a point that one of them may come to alone. All of them make one, equally often."""

    def __init__(self, world: World) -> None:
        self._size, self._table = world.size, world.store() if world.size > 1 else None

    def mark(self) -> None:
        """This process has come."""
        if self._table is not None:
            self._table.add("come", 1)

    def all_within(self, seconds: float) -> bool:
        """Whether every process has come, waiting for them at most so long."""
        end = time.monotonic() + seconds
        while self._table is not None and self._table.add("come", 0) < self._size:
            if time.monotonic() > end:
                return False
            time.sleep(_POLL)
        return True


ALONE = World()
_TABLES = itertools.count()
# A process that ends breaks its connections, which ends the others at once; these are for one that hangs, or a host
# that is gone silently. In a training all come to an exchange together, but for a preview or a compilation; at a
# barrier the others wait while the first packs images or measures features.
_TIMEOUT, _PATIENCE = datetime.timedelta(minutes=30), datetime.timedelta(days=7)
_patient: Any = None  # for barriers and objects
_POLL = 0.05  # seconds


class _Sum(torch.autograd.Function):
    """The sum over the processes. Each of them uses it, so that its gradient is a sum over them, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def lost_process(error: Exception) -> bool:
    """Whether the error is that another process has ended, which prints why."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and dist.is_initialized() and "/gloo/" in str(error)
    )


def init_distributed() -> World:
    """Joins the processes that torchrun started: NCCL on GPUs, one process each; gloo otherwise.

    Raises:
        UserError: variables of torchrun are missing or not as it sets them, the other processes cannot be reached, or a
            machine with GPUs has more processes than GPUs.
    """
    global _patient
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        return ALONE
    _check_environment()
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} has no GPU: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
            store = dist.PrefixStore(_attempt(store, rank, size), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
            _patient = dist.new_group(timeout=_PATIENCE, backend="gloo")
        except (RuntimeError, ValueError) as error:  # no address, a port in use, a process that never came
            reason = first_line(error)
            raise UserError(f"cannot join the other processes ({reason}); start all of them with torchrun") from None
        atexit.register(_leave, None if backend == "gloo" else _patient)
    if dist.get_rank():
        logging.getLogger().setLevel(logging.WARNING)  # the first process logs for all
    return World(dist.get_rank(), dist.get_world_size())


def _leave(group: Any) -> None:
    """Ends gloo's threads, or they may outlive the interpreter, and the process ends in an abort."""
    gc.collect()  # optimizers hold the group, and their hooks themselves
    dist.destroy_process_group(group)


def _attempt(store: dist.Store, rank: int, size: int) -> str:
    """A name that the processes of this attempt share, and none of an earlier one had. torchrun keeps one store for all
    attempts, where addresses of processes that have ended would be taken for those of their successors (PyTorch's issue
    135712).

    Each process leaves a new number. The first answers with all of them, and again when one has changed, until
    everyone has found its own in an answer; the first process's number is the name.

    Raises:
        RuntimeError: one has not come within _TIMEOUT.
    """
    mine = uuid.uuid4().hex
    end = time.monotonic() + _TIMEOUT.total_seconds()
    store.set(f"attempt/{rank}", mine)
    if rank:
        while True:
            numbers = store.get("attempt/numbers").decode().split()
            if numbers[rank : rank + 1] == [mine]:
                store.set(f"attempt/{numbers[0]}/{rank}", "")
                return numbers[0]
            _pause(end, "the first process")
    while missing := [other for other in range(1, size) if not store.check([f"attempt/{mine}/{other}"])]:
        store.set("attempt/numbers", " ".join(store.get(f"attempt/{other}").decode() for other in range(size)))
        _pause(end, f"process {missing[0]}")
    return mine


def _pause(end: float, awaited: str) -> None:
    if time.monotonic() > end:
        raise RuntimeError(f"{awaited} has not answered for {_TIMEOUT.total_seconds() / 60:g} minutes")
    time.sleep(_POLL)


def _check_environment() -> None:
    if missing := [name for name in _TORCHRUN if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE is set, but {', '.join(missing)} not: start several processes with torchrun, "
            "or unset WORLD_SIZE"
        )
    size = os.environ["WORLD_SIZE"]
    for name, most in (("WORLD_SIZE", "1000000"), ("RANK", size), ("LOCAL_RANK", size), ("MASTER_PORT", "65536")):
        value = os.environ[name]
        if not (re.fullmatch("[0-9]{1,7}", value) and int(value) < int(most)):
            raise UserError(
                f"{name}={value} is not as torchrun sets it: start several processes with torchrun, or unset WORLD_SIZE"
            )
