"""Batches of an image set in any order, as uint8 on the device that trains."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .crops import Crop
from .errors import counted
from .image_set import ImageSet

_log = logging.getLogger(__name__)

_AHEAD = 2  # batches decoded beyond the one in hand
_SHARE = 1 / 4  # of the memory that is free, for a set that stays on the device


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples on one device, safe to keep.

    Attributes:
        images: (B, H, W, C) uint8.
        labels: (B,) int64 classes.
        synthetic: (B,) bool, true for generated samples.
        index: (B,) int64, the sample's name as it was given to `write`.
        sample: (B,) int64, the sample's number in the joined set.
        position: (B,) int64, the draw's place in the stream, the key of its augmentation.
    """

    images: torch.Tensor
    labels: torch.Tensor
    synthetic: torch.Tensor
    index: torch.Tensor
    sample: torch.Tensor
    position: torch.Tensor


class Loader:
    """Reads batches of a set.

    Every batch is on `device` when it comes. Where the pixels wait until then is chosen once and logged:

    - on a CPU, raw images of one size, uncropped: in the page cache; a batch is a gather, no memory grows with the set
    - else, without a random crop and within a quarter of the device's free memory: on the device, decoded once
      (`resident`); a batch is a gather there
    - else in the files: threads decode ahead, and a GPU copies from pinned memory on a stream of its own

    Args:
        num_workers: threads that decode; None takes this process's share of the processors.
        device: where the batches go.
        crop: the part of each image to show, resized; None takes images as they are, which must be of one size.
        resident: whether the set stays on the device where it is not in the page cache; None chooses.

    Raises:
        ValueError: batch_size or num_workers below 1; images of several sizes without a crop; `resident` with a random
            crop.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        num_workers: int | None = None,
        device: torch.device | str = "cpu",
        crop: Crop | None = None,
        resident: bool | None = None,
    ) -> None:
        self.num_workers = available_cores() if num_workers is None else num_workers
        if batch_size < 1 or self.num_workers < 1:
            raise ValueError(f"need batch_size and num_workers >= 1, got {batch_size} and {num_workers}")
        if crop is not None and crop.random and resident:
            raise ValueError("a set that is cropped at random cannot stay on the device")
        self.image_set = image_set
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.crop = crop
        self._shape = image_set.image_shape if crop is None else (crop.size, crop.size, image_set.channels)
        self._columns = [
            torch.from_numpy(column).to(self.device)
            for column in (image_set.labels, image_set.synthetic, image_set.index)
        ]
        self._pixels: torch.Tensor | None = None  # of a resident set, once they are wanted
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._mapped = self.device.type == "cpu" and crop is None and image_set.mapped
        self.resident = self._choose(resident)

    def batches(self, order: np.ndarray, positions: np.ndarray | None = None) -> Iterator[Batch]:
        """The samples of `order`, batch by batch; the last batch may be short. Closing the iterator stops its threads.

        Args:
            order: (n,) integers in [0, N), repeats allowed.
            positions: (n,) integers, the draws' places in the stream; None counts from 0.

        Raises:
            ValueError: at once, `order` or `positions` is anything else.
            SampleError: while iterating, an image does not decode; it is named.
        """
        order = np.asarray(order)
        if order.ndim != 1 or (order.size and order.dtype.kind not in "iu"):
            raise ValueError(f"an order is a row of sample numbers, got {order.dtype} of shape {order.shape}")
        if order.size and not 0 <= order.min() <= order.max() < len(self.image_set):
            size = len(self.image_set)
            raise ValueError(f"the order holds {order.min()} to {order.max()}, the set 0 to {size - 1}")
        positions = np.arange(len(order)) if positions is None else np.asarray(positions)
        if positions.shape != order.shape:
            raise ValueError(f"{len(order)} draws have positions of shape {positions.shape}")
        return self._batches(order.astype(np.int64), positions.astype(np.int64))

    def sequential(self) -> Iterator[Batch]:
        """Every sample once, in the set's own order."""
        return self.batches(np.arange(len(self.image_set)))

    def _batches(self, order: np.ndarray, positions: np.ndarray) -> Iterator[Batch]:
        samples, places = (torch.from_numpy(x).to(self.device) for x in (order, positions))
        pixels = self._gathered(samples) if self._mapped or self.resident else self._decoded(order, positions)
        with closing(pixels):
            for begin, images in zip(range(0, len(order), self.batch_size), pixels, strict=True):
                sample = samples[begin : begin + self.batch_size].clone()
                labels, synthetic, index = (column[sample] for column in self._columns)
                position = places[begin : begin + self.batch_size].clone()
                yield Batch(images, labels, synthetic, index, sample, position)

    def _gathered(self, samples: torch.Tensor) -> Generator[torch.Tensor, None, None]:
        pixels = None if self._mapped else self._on_device()
        for begin in range(0, len(samples), self.batch_size):
            chosen = samples[begin : begin + self.batch_size]
            if pixels is None:
                yield torch.from_numpy(self.image_set.take(chosen.numpy()))
            elif self.device.type == "cpu":  # torch would share even a small copy among threads and wait for them
                yield torch.from_numpy(pixels.numpy()[chosen.numpy()])
            else:
                yield pixels[chosen]

    def _on_device(self) -> torch.Tensor:
        """The whole set, decoded when it is first wanted."""
        if self._pixels is None:
            whole = np.arange(len(self.image_set))
            pixels = torch.empty((len(whole), *self._shape), dtype=torch.uint8, device=self.device)
            for at, images in enumerate(self._decoded(whole, whole)):
                pixels[at * self.batch_size :][: len(images)] = images
            self._pixels = pixels
        return self._pixels

    def _decoded(self, order: np.ndarray, positions: np.ndarray) -> Generator[torch.Tensor, None, None]:
        """Threads decode each batch in equal shares, a few batches ahead."""
        ahead: deque[tuple[torch.Tensor, list[Future[None]]]] = deque()

        def oldest() -> torch.Tensor:
            images, shares = ahead.popleft()
            for share in shares:
                share.result()
            return self._sent(images)

        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="decode") as pool:
            try:
                for begin in range(0, len(order), self.batch_size):
                    batch = slice(begin, min(begin + self.batch_size, len(order)))
                    size = batch.stop - begin
                    images = torch.empty((size, *self._shape), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
                    share = -(-size // self.num_workers)
                    parts = [slice(at, at + share) for at in range(0, size, share)]
                    drawn, places, out = order[batch], positions[batch], images.numpy()
                    shares = [pool.submit(self._read, drawn[part], places[part], out[part]) for part in parts]
                    ahead.append((images, shares))
                    if len(ahead) > _AHEAD:
                        yield oldest()
                while ahead:
                    yield oldest()
            finally:
                pool.shutdown(cancel_futures=True)

    def _sent(self, images: torch.Tensor) -> torch.Tensor:
        """A batch on the device: what is queued there next waits for the copy, the host does not."""
        if self._copies is None:
            return images.to(self.device)
        with torch.cuda.stream(self._copies):
            there = images.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._copies)
        there.record_stream(computing)  # its memory goes to no other copy before the work queued with it is done
        return there

    def _read(self, samples: np.ndarray, positions: np.ndarray, out: np.ndarray) -> None:
        boxes = None if self.crop is None else self.crop.boxes(self.image_set.sizes[samples], positions)
        self.image_set.read(samples, out, boxes)

    def _choose(self, resident: bool | None) -> bool:
        size, room = len(self.image_set) * int(np.prod(self._shape)), int(free_memory(self.device) * _SHARE)
        if self._mapped:
            resident, reason = False, "raw"
        elif resident is not None:
            reason = "as asked for"
        elif self.crop is not None and self.crop.random:
            resident, reason = False, "cropped at random"
        else:
            resident, reason = size <= room, f"for {room / 1e6:.0f} MB of {self.device} memory"
        names = ", ".join(map(str, self.image_set.paths))
        how = f"kept on {self.device}" if resident else f"decoded ahead by {counted(self.num_workers, 'thread(s)')}"
        how = "gathered from the page cache" if self._mapped else how
        level = logging.DEBUG if self._mapped else logging.INFO  # nothing was chosen, and sets are opened often
        _log.log(level, "%s: %d images, %.1f MB, %s (%s)", names, len(self.image_set), size / 1e6, how, reason)
        return resident


def available_cores() -> int:
    """The processors that this process may use, shared with the others that torchrun started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device, 0 where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
