"""Several processes on one job, started by torchrun; alone, everything here does nothing."""

from __future__ import annotations

import atexit
import logging
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from diffult.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: 0 <= rank < size."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def local_slice(self, count: int, what: str) -> slice:
        """This process's share of `count` samples, all shares equal and in order of rank.

        Raises:
            UserError: the processes do not divide the count.
        """
        if count % self.size:
            raise UserError(f"{what} = {count} cannot be shared by {self.size} processes; make it a multiple")
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def average_(self, x: torch.Tensor) -> None:
        """Replaces x by its mean over the processes; the same bits on each."""
        if self.size > 1:
            dist.all_reduce(x)
            x.div_(self.size)

    def gather(self, mine: T) -> list[T]:
        """What each process gave, in order of rank, on every process."""
        if self.size == 1:
            return [mine]
        everyone: list[T] = [mine] * self.size
        dist.all_gather_object(everyone, mine)
        return everyone

    def barrier(self) -> None:
        """Returns when every process is here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


def init_distributed() -> World:
    """Joins the processes that torchrun started: NCCL where there is a GPU for each, gloo otherwise.

    Raises:
        UserError: more processes on this machine than GPUs, on a machine that has any.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} has no GPU: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend)
        if backend == "gloo":  # or its threads may outlive the interpreter, and the process ends in an abort
            atexit.register(dist.destroy_process_group)
    if dist.get_rank():
        logging.getLogger().setLevel(logging.WARNING)  # the first process tells for all
    return World(dist.get_rank(), size)
