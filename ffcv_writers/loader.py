"""Batches of an image set in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .available import have_ffcv
from .image_set import ImageSet
from .memory import MemorySet


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples on one device, safe to keep.

    Attributes:
        images: (B, H, W, C) uint8.
        labels: (B,) int64 classes.
        synthetic: (B,) bool, true for generated samples.
        index: (B,) int64, the sample's name as it was given to `write`.
        sample: (B,) int64, the sample's number in the joined set.
    """

    images: torch.Tensor
    labels: torch.Tensor
    synthetic: torch.Tensor
    index: torch.Tensor
    sample: torch.Tensor


def open_set(paths: Sequence[Path]) -> ImageSet:
    """The files that `write` wrote, of one format, joined end to end.

    Raises:
        ValueError: no files, files of both formats, a file that is missing, damaged or of another image
            shape, or .beton files without ffcv.
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} does not exist: run the stage that writes it")
    endings = {path.suffix for path in paths}
    if endings == {".npz"}:
        return MemorySet(paths)
    if endings != {".beton"}:
        raise ValueError(f"need .beton files or .npz files, not both, got {[str(path) for path in paths]}")
    if not have_ffcv():
        raise ValueError(f"{paths[0]} needs ffcv, which is not there: install it or write the set as .npz")
    from .beton import BetonSet

    return BetonSet(paths)


class Loader:
    """Reads batches of a set; what it compiles or opens serves all its orders.

    Args:
        image_set: the set, joined files included.
        batch_size: B.
        num_workers: threads that decode one batch of JPEGs; raw images need no more than one.
        device: where the batches go.

    Raises:
        ValueError: batch_size or num_workers below 1.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        num_workers: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1 or num_workers < 1:
            raise ValueError(f"need batch_size and num_workers >= 1, got {batch_size} and {num_workers}")
        self.image_set = image_set
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._read = image_set.pixel_reader(batch_size, num_workers)

    def batches(self, order: np.ndarray) -> Iterator[Batch]:
        """The samples of `order`, batch by batch; the last batch may be short.

        Leaving the iterator before its end stops its threads, as soon as it is closed or forgotten.

        Args:
            order: integers in [0, N), one dimension, any length, repeats allowed.

        Raises:
            ValueError: at once, if `order` is anything else.
            RuntimeError: while iterating, if ffcv cannot decode a batch.
        """
        order = np.asarray(order)
        if order.ndim != 1 or (order.size and order.dtype.kind not in "iu"):
            raise ValueError(f"an order is a row of sample numbers, got {order.dtype} of shape {order.shape}")
        if order.size and not 0 <= order.min() <= order.max() < len(self.image_set):
            size = len(self.image_set)
            raise ValueError(f"the order holds {order.min()} to {order.max()}, the set 0 to {size - 1}")
        return self._batches(order.astype(np.int64))

    def sequential(self) -> Iterator[Batch]:
        """Every sample once, in the set's own order."""
        return self.batches(np.arange(len(self.image_set)))

    def _batches(self, order: np.ndarray) -> Iterator[Batch]:
        known = self.image_set
        with closing(self._read(order)) as reading:
            for number, pixels in enumerate(reading):
                sample = order[number * self.batch_size :][: len(pixels)]
                columns = (known.labels[sample], known.synthetic[sample], known.index[sample], sample.copy())
                yield Batch(*map(self._to_device, (pixels, *columns)))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":  # from pinned memory the copy need not be waited for
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)
