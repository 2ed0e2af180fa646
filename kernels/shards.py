"""Flat buffers of parameters in several processes: ZeRO, stage 1 (Rajbhandari et al. 2020, arXiv 1910.02054).

A buffer of all parameters is cut into equal buckets, and each bucket into one piece for each of the n processes. A
process keeps what an optimizer knows about its own pieces alone, [buckets, piece]. In a step it sends

    (n - 1) / n of the gradient    reduce-scatter, bucket by bucket: the sum of its pieces over the processes
    (n - 1) / n of the weights     all-gather, bucket by bucket: the pieces that the others have updated

together just what one all-reduce of the gradient would send.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROW = 4096  # elements: pieces are whole rows, so that kernels need no masks and norms are summed by rows
_BUCKET = 1 << 24  # elements at most: large enough for full bandwidth, small enough that a network has several
# As torch < 2.14 calls them.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Shards:
    """How flat buffers are shared by the processes of a group, all of which must call each method that exchanges.

    Attributes:
        length: of a whole buffer, `least` or a little more.
        bucket: its length.
        buckets: their number; one where the process is alone.
        rank, size: of this process, 0 <= rank < size.
    """

    def __init__(self, least: int, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self.buckets = 1 if self.size == 1 else -(-least // _BUCKET)
        self._piece = -(-least // (self.buckets * self.size * ROW)) * ROW
        self.bucket = self.size * self._piece
        self.length = self.buckets * self.bucket

    def own(self, whole: Tensor) -> Tensor:
        """This process's pieces of a whole buffer, one after the other, [length / size]; alone, the buffer itself."""
        if self.size == 1:
            return whole
        pieces = whole.view(self.buckets, self.size, self._piece)[:, self.rank]
        return pieces.clone(memory_format=torch.contiguous_format).view(-1)

    def all_gather(self, own: Tensor, whole: Tensor) -> None:
        """Fills a whole buffer with the pieces of every process."""
        if self.size == 1:
            whole.copy_(own)
            return
        pairs = zip(own.split(self._piece), whole.split(self.bucket), strict=True)
        for work in [_all_gather(bucket, piece, group=self.group, async_op=True) for piece, bucket in pairs]:
            work.wait()

    def gather_on_host(self, own: Tensor) -> Tensor | None:
        """A copy of the whole buffer in the host memory of the first process, bucket by bucket; None on the others."""
        if self.size == 1:
            return own.to("cpu", copy=True)
        whole = own.new_empty(self.length, device="cpu") if self.rank == 0 else None
        bucket = own.new_empty(self.bucket) if self.rank == 0 else None
        for number, piece in enumerate(own.split(self._piece)):
            pieces = None if bucket is None else list(bucket.split(self._piece))
            dist.gather(piece, pieces, group=self.group, group_dst=0)
            if whole is not None and bucket is not None:
                whole[number * self.bucket :][: self.bucket] = bucket
        return whole

    def norm(self, of_own: Tensor) -> Tensor:
        """The norm of a whole buffer from those of its parts, [] each; the same bits on every process."""
        if self.size == 1:
            return of_own
        norms = of_own.new_empty(self.size)
        _all_gather(norms, of_own[None], group=self.group)
        return torch.linalg.vector_norm(norms)


class GradientExchange:
    """Averages a flat gradient over the processes, each receiving its own pieces.

    Buckets are sent from the last to the first, as a backward pass completes them. After `overlap` they are sent while
    it runs on, each as soon as the gradients in it have arrived (as DistributedDataParallel does: Li et al. 2020, arXiv
    2006.15704); always in the same order, as all processes must come to the same exchanges. A network that is compiled
    whole has its gradients at the end of its backward pass, all at once: there is nothing to overlap with then.
    """

    def __init__(self, shards: Shards, grad: Tensor, spans: Iterable[tuple[nn.Parameter, int, int]]) -> None:
        """
        Args:
            spans: each parameter with the part of `grad`, from and to, that its gradient is a view of.
        """
        self._shards, self._buckets = shards, grad.split(shards.bucket)
        self._own = grad.new_empty(shards.length // shards.size)
        self._pieces = self._own.split(shards.bucket // shards.size)
        self._awaited = [0] * shards.buckets  # gradients by bucket
        for parameter, start, stop in spans:
            buckets = range(start // shards.bucket, -(-stop // shards.bucket))
            for bucket in buckets:
                self._awaited[bucket] += 1
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, buckets))
        self._missing: list[int] | None = None  # gradients by bucket, where a backward pass is overlapped
        self._sent: list[Any] = []

    def overlap(self) -> None:
        """The gradients of the backward pass that follows are the last of this step."""
        self._missing = list(self._awaited)

    def _arrived(self, buckets: range, _: Tensor) -> None:
        if self._missing is not None:
            for bucket in buckets:
                self._missing[bucket] -= 1
            while len(self._sent) < len(self._buckets) and not self._missing[-1 - len(self._sent)]:
                self._send()

    def _send(self) -> None:
        place = -1 - len(self._sent)
        piece, bucket = self._pieces[place], self._buckets[place]
        self._sent.append(_reduce_scatter(piece, bucket, group=self._shards.group, async_op=True))

    def finish(self) -> Tensor:
        """Sends what is left and returns this process's pieces of the mean, [length / size], until the next one."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for work in self._sent:
            work.wait()
        self._sent, self._missing = [], None
        return self._own.div_(self._shards.size)
