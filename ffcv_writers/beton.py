"""ffcv's .beton files, written and read around the hazards of ffcv 1.0.2. Importing this module needs ffcv.

- ffcv's writer waits for ever when one of its processes raises or dies, and its shared memory outlives a
  kill. Here the calling thread encodes: an error is an exception, and there is nothing to leave behind.
- ffcv's loader waits for ever when its pipeline raises, and its thread outlives an abandoned loop.
- ffcv sets torch's number of threads for the whole process: at import, with each Loader, in each epoch.
- Out-of-range pointers in a file's tables are followed by compiled code: they are checked before.

Fields: image (raw: NDArrayField, for any number of channels; jpg: RGBImageField), label, synthetic, index.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from .image_set import ImageSet, Part, PixelReader, Shape, damaged


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


with _torch_threads_kept():
    import numba
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.reader import Reader
    from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter, handle_sample

FIELDS = ("image", "label", "synthetic", "index")
_LARGEST_USUAL_PAGE = 4 * MIN_PAGE_SIZE  # ffcv's default, 8 MiB


class _Writer(DatasetWriter):
    """ffcv's writer, run in the calling thread."""

    metadata_sm: Any

    def prepare(self) -> None:
        super().prepare()
        shared, self.metadata_sm = self.metadata_sm, SimpleNamespace(buf=bytearray(self.metadata_sm.size))
        shared.close()
        shared.unlink()

    def run(self, num_samples: int, rows: Iterable[Sequence[Any]]) -> None:
        self.num_samples = num_samples
        self.prepare()
        metadata = np.frombuffer(self.metadata_sm.buf, self.metadata_type, num_samples)
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        with allocator:
            for number, row in enumerate(rows):
                handle_sample(row, number, self.metadata_type.names, metadata, allocator, self.fields)
        self.finalize(allocator.allocations)


def write_beton(
    path: Path,
    images: Iterable[np.ndarray],
    shape: Shape,
    columns: Mapping[str, np.ndarray],
    jpg_quality: int | None,
) -> None:
    """Writes uint8 images of one shape and the (n,) int64 columns label, synthetic and index.

    Pages grow with the set from 2 MiB, the least that ffcv allows, to 8 MiB, its default; the smallest file
    takes two. With `jpg_quality` images are stored as JPEG, without it raw.
    """
    if jpg_quality is None:
        image_field = NDArrayField(np.dtype(np.uint8), shape)
    else:
        image_field = RGBImageField("jpg", jpeg_quality=jpg_quality)
    names = FIELDS[1:]
    fields = {"image": image_field, **{name: IntField() for name in names}}
    image_bytes = int(np.prod(shape))
    wanted = max(image_bytes, min(image_bytes * len(columns["label"]), _LARGEST_USUAL_PAGE), MIN_PAGE_SIZE)
    writer = _Writer(str(path), fields, page_size=1 << (wanted - 1).bit_length(), num_workers=1)
    writer.run(len(columns["label"]), zip(images, *(columns[name] for name in names), strict=True))
    _read(path)  # ffcv does not look at how much of a page the disk took


class BetonSet(ImageSet):
    """A set of .beton files. Only their tables are read here, not the pixels.

    Args:
        paths: at least one file that `write` wrote.

    Raises:
        ValueError: a file that is damaged or of another image shape.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__([_read(path) for path in paths])

    def pixel_reader(self, batch_size: int, num_workers: int) -> PixelReader:
        """See `ImageSet`. `num_workers` threads decode a batch of JPEGs; raw images are copied by one a file.

        Makes one ffcv Loader a file; each compiles its pipeline once, at its first batch.
        """
        loaders = [_loader(path, batch_size, num_workers) for path in self.paths]

        def read(order: np.ndarray) -> Generator[np.ndarray, None, None]:
            file = np.searchsorted(self.starts, order, side="right") - 1
            streams: list[_Stream] = []
            try:
                for k, loader in enumerate(loaders):
                    places = np.flatnonzero(file == k)
                    if places.size:
                        streams.append(_Stream(loader, order[places] - self.starts[k], places))
                for begin in range(0, len(order), batch_size):
                    end = min(begin + batch_size, len(order))
                    pixels = np.empty((end - begin, *self.image_shape), np.uint8)
                    for stream in streams:
                        stream.fill(pixels, begin, end)
                    yield pixels
            finally:
                for stream in streams:
                    stream.close()

        return read


def _loader(path: Path, batch_size: int, num_workers: int) -> Loader:
    threads = min(num_workers, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    with _torch_threads_kept():
        return Loader(
            str(path),
            batch_size,
            num_workers=threads,
            os_cache=True,
            seed=0,  # of no effect; but without one ffcv draws it from numpy's global generator
            pipelines=dict.fromkeys(FIELDS[1:]),  # none for what is at hand, the default for image
        )


class _Epoch(EpochIterator):
    """ffcv's thread that decodes an order's samples ahead, in batches; it tells errors and can be stopped.

    Made without the Loader's own `__iter__`, which would cut every order to the length of the first.
    """

    def __init__(self, loader: Loader, order: np.ndarray) -> None:
        self.torch_threads = torch.get_num_threads()
        super().__init__(loader, order)

    def run_pipeline(self, b_ix: int, *arguments: Any) -> Any:
        if self.terminate_event.is_set():
            raise StopIteration  # which is how ffcv's run() ends
        if b_ix == 0:
            torch.set_num_threads(self.torch_threads)
        try:
            return super().run_pipeline(b_ix, *arguments)
        except Exception as error:  # raised on the other side
            return error

    def stop(self) -> None:
        self.terminate_event.set()
        while self.is_alive():  # it may be waiting for room in the queue
            with suppress(Empty):
                while True:
                    self.output_queue.get_nowait()
            time.sleep(0.0002)


class _Stream:
    """One file's share of an order, decoded ahead and put where it belongs.

    A decoded batch is a view of ffcv's ring of buffers. It holds batches_ahead + 2: those that wait, the one
    being decoded and the one in hand. So no more than one may be in hand.
    """

    def __init__(self, loader: Loader, samples: np.ndarray, places: np.ndarray) -> None:
        self.epoch = _Epoch(loader, samples)
        self.path = loader.fname
        self.places = places  # (n,), ascending: where in the order each sample of the share belongs
        self.done = 0
        self.rest = np.empty(0, np.uint8)  # of the batch in hand

    def fill(self, pixels: np.ndarray, begin: int, end: int) -> None:
        """Puts this share's samples among [begin, end) of the order into `pixels`."""
        until = int(np.searchsorted(self.places, end))
        while self.done < until:
            if not len(self.rest):
                self.rest = self._next_batch()
            count = min(until - self.done, len(self.rest))
            # numpy, not torch, which shares each small copy among threads: 60 x slower beside a busy one
            pixels[self.places[self.done : self.done + count] - begin] = self.rest[:count]
            self.rest = self.rest[count:]
            self.done += count

    def _next_batch(self) -> np.ndarray:
        result = next(self.epoch)
        if isinstance(result, Exception):
            raise RuntimeError(f"ffcv could not decode {self.path}: {result!r}") from result
        return result[0].numpy()

    def close(self) -> None:
        self.epoch.stop()


def _read(path: Path) -> Part:
    try:
        reader = Reader(str(path))
        shape = _checked_shape(reader, path.stat().st_size)
        labels, synthetic, index = (reader.metadata[f"f{i}"].copy() for i in (1, 2, 3))
    except Exception as error:  # a broken table makes ffcv raise almost anything
        raise damaged(path, str(error) or repr(error)) from error
    return Part(path, shape, labels, synthetic.astype(bool), index)


def _checked_shape(reader: Reader, file_size: int) -> Shape:
    """The image shape, once everything that compiled code will trust has been checked."""
    if tuple(reader.field_names) != FIELDS:
        raise ValueError(f"its fields are {reader.field_names}")
    table, image = reader.alloc_table, reader.metadata["f0"]
    table_start = int(reader.header["alloc_table_ptr"])
    if not 0 < reader.num_samples == len(reader.metadata) == len(table):
        raise ValueError("cut short")
    if table_start + table.nbytes != file_size or (table["ptr"] + table["size"]).max() > table_start:
        raise ValueError("cut short or overwritten")
    field = reader.handlers["image"]
    if isinstance(field, NDArrayField):
        pointers, shape = image, tuple(int(side) for side in field.shape)
        sound = field.dtype == np.uint8 and len(shape) == 3 and (table["size"] == np.prod(shape)).all()
    else:
        pointers, shape = image["data_ptr"], (int(image["height"][0]), int(image["width"][0]), 3)
        sound = (image["mode"] == IMAGE_MODES["jpg"]).all()
        sound &= (image["height"] == shape[0]).all() and (image["width"] == shape[1]).all()
    if not sound or not np.array_equal(np.sort(pointers), np.sort(table["ptr"])):
        raise ValueError("its tables disagree")
    return shape[0], shape[1], shape[2]
