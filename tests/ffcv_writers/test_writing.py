"""Image sets on disk: bits survive, orders are kept, nothing hangs and nothing is left behind."""

from __future__ import annotations

import io
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ffcv_reader import read_by_ffcv
from PIL import Image

from ffcv_writers import Loader, encoding, open_set, write
from ffcv_writers.decoding import centre_square, limit_shorter_side

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]


def random_set(number: int, shape: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (number, *shape), dtype=np.uint8)
    columns = {
        "labels": generator.integers(0, 10, number),
        "synthetic": generator.integers(0, 2, number),
        "index": generator.integers(0, 2**40, number),
    }
    return images, columns


def segments() -> set[str]:
    shared = Path("/dev/shm")
    return {path.name for path in shared.glob("psm_*")} if shared.is_dir() else set()


class Samples:
    """Images of which one raises or is odd."""

    def __init__(self, images: np.ndarray, bad: int, odd: np.ndarray | None = None) -> None:
        self.images, self.bad, self.odd = images, bad, odd

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> np.ndarray:
        if number != self.bad:
            return self.images[number]
        if self.odd is None:
            raise OSError("the disk is on fire")
        return self.odd


@pytest.mark.parametrize("shape", SHAPES)
def test_raw_images_keep_every_bit(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    images, columns = random_set(700, shape)
    path = tmp_path / "made" / "set.beton"
    write(path, images, **columns, workers=2)
    image_set = open_set([path])
    assert image_set.image_shape == shape and len(image_set) == 700
    np.testing.assert_array_equal(image_set.labels, columns["labels"])
    np.testing.assert_array_equal(image_set.synthetic, columns["synthetic"] == 1)
    np.testing.assert_array_equal(image_set.index, columns["index"])

    batches = list(Loader(image_set, 128).sequential())
    assert [len(batch.images) for batch in batches] == [128] * 5 + [60]
    assert batches[0].images.dtype == torch.uint8 and batches[0].synthetic.dtype == torch.bool
    assert all(getattr(batches[0], name).dtype == torch.int64 for name in ("labels", "index", "sample", "position"))
    np.testing.assert_array_equal(torch.cat([batch.images for batch in batches]).numpy(), images)
    np.testing.assert_array_equal(torch.cat([batch.labels for batch in batches]).numpy(), columns["labels"])
    np.testing.assert_array_equal(torch.cat([batch.sample for batch in batches]).numpy(), np.arange(700))
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(("os_cache", "shape"), [(True, (64, 128, 1)), (False, (32, 32, 3))])
def test_ffcv_itself_reads_what_is_written(tmp_path: Path, os_cache: bool, shape: tuple[int, int, int]) -> None:
    pytest.importorskip("ffcv")
    images, columns = random_set(3 * 1024, shape)  # grey: 25 MB in four pages of 8 MiB
    write(tmp_path / "set.beton", images, **columns)
    fields = read_by_ffcv(tmp_path / "set.beton", 500, os_cache=os_cache)
    for field, expected in zip(fields, (images, *columns.values()), strict=True):
        np.testing.assert_array_equal(field.squeeze(), expected.squeeze())
    order = np.random.default_rng(1).permutation(len(images))
    read = [batch.images for batch in Loader(open_set([tmp_path / "set.beton"]), 500).batches(order)]
    np.testing.assert_array_equal(torch.cat(read).numpy(), images[order])


def test_a_small_beton_is_small(tmp_path: Path) -> None:
    images, columns = random_set(300, (8, 8, 1))
    write(tmp_path / "set.beton", images, **columns)
    assert (tmp_path / "set.beton").stat().st_size < images.nbytes + 300 * 64 + 5000


@pytest.mark.parametrize("storage", ["raw", "jpg"])
def test_writing_takes_no_more_memory_for_more_images(tmp_path: Path, storage: str) -> None:
    class Made:
        def __len__(self) -> int:
            return 1500

        def __getitem__(self, number: int) -> np.ndarray:
            return np.full((120, 120, 3), number % 256, np.uint8)

    names = np.arange(1500)
    tracemalloc.start()
    write(tmp_path / "set.beton", Made(), labels=names, synthetic=0 * names, index=names, storage=storage, workers=2)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6  # of 65 MB: some 200 images that are read ahead


@pytest.mark.parametrize("num_workers", [1, 2])
def test_jpg_images_come_back_close_and_in_rgb(tmp_path: Path, num_workers: int) -> None:
    ramp = np.linspace(0, 120, 32)[None, :, None] + np.array([100, 50, 0])
    images = np.broadcast_to(ramp, (200, 32, 32, 3)).astype(np.uint8)
    _, columns = random_set(200, (1, 1, 3))
    write(tmp_path / "set.beton", images, **columns, storage="jpg")
    loader = Loader(open_set([tmp_path / "set.beton"]), 64, num_workers=num_workers)
    for batch in loader.sequential():
        assert (batch.images.float() - torch.from_numpy(ramp)).abs().max() < 6


def test_joined_files_follow_any_order(tmp_path: Path) -> None:
    parts = [random_set(number, (8, 8, 3), seed) for seed, number in enumerate((130, 7, 400))]
    paths = [tmp_path / f"{number}.beton" for number in range(3)]
    for path, (images, columns) in zip(paths, parts, strict=True):
        write(path, images, **columns)
    joined = open_set(paths)
    images = np.concatenate([part[0] for part in parts])
    loader = Loader(joined, 16)
    generator = np.random.default_rng(2)
    orders = [
        generator.integers(0, 537, 16 * 40),  # with repeats, many times the ring of buffers
        generator.integers(0, 537, 1003),
        generator.permutation(137),  # nothing of the last file
        np.array([131, 131, 131]),
        np.arange(537)[::-1],
        np.array([], np.int64),
    ]
    for order in orders:  # one loader serves them all
        batches = list(loader.batches(order))  # kept: compared when the loader has moved on
        assert [len(batch.images) for batch in batches] == [
            min(16, len(order) - start) for start in range(0, len(order), 16)
        ]
        for number, batch in enumerate(batches):
            sample = order[16 * number :][:16]
            np.testing.assert_array_equal(batch.sample.numpy(), sample)
            np.testing.assert_array_equal(batch.images.numpy(), images[sample])
            np.testing.assert_array_equal(batch.labels.numpy(), joined.labels[sample])
            np.testing.assert_array_equal(batch.synthetic.numpy(), joined.synthetic[sample])
            np.testing.assert_array_equal(batch.index.numpy(), joined.index[sample])


@pytest.mark.timeout(200)
@pytest.mark.parametrize("resident", [True, False])
def test_two_iterators_of_one_loader_and_an_abandoned_one_leave_no_thread(tmp_path: Path, resident: bool) -> None:
    images, columns = random_set(400, (8, 8, 3))
    for name in ("a", "b"):
        write(tmp_path / f"{name}.beton", images, **columns, storage="jpg")
    joined = open_set([tmp_path / "a.beton", tmp_path / "b.beton"])
    stored = joined.take(np.arange(800))
    loader = Loader(joined, 8, num_workers=2, resident=resident)
    order = np.random.default_rng(0).permutation(800)
    before = set(threading.enumerate())
    for taken in (1, 5, 30):
        for number, _ in enumerate(loader.batches(order)):
            assert resident == (set(threading.enumerate()) == before)
            if number == taken:
                break
        assert set(threading.enumerate()) == before
    for one, other in zip(loader.batches(order), loader.batches(order[::-1]), strict=True):
        np.testing.assert_array_equal(one.images.numpy(), stored[one.sample.numpy()])
        np.testing.assert_array_equal(other.images.numpy(), stored[other.sample.numpy()])
    assert set(threading.enumerate()) == before


def test_reading_leaves_global_state_alone(tmp_path: Path) -> None:
    images, columns = random_set(64, (8, 8, 3))
    write(tmp_path / "set.beton", images, **columns, storage="jpg")
    threads = torch.get_num_threads()
    seen_by_new_threads: list[int] = []
    try:
        torch.set_num_threads(3)
        np.random.seed(5)
        state = np.random.get_state()[1].copy()
        list(Loader(open_set([tmp_path / "set.beton"]), 8, resident=False).sequential())
        assert (np.random.get_state()[1] == state).all()
        asking = threading.Thread(target=lambda: seen_by_new_threads.append(torch.get_num_threads()))
        asking.start()
        asking.join()
        assert torch.get_num_threads() == 3 and seen_by_new_threads == [3]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (None, "sample 333 could not be read.*the disk is on fire"),
        (np.zeros((8, 9, 1), np.uint8), "sample 333 has shape"),
        (np.zeros((8, 8, 1), np.float32), "sample 333 must be uint8"),
    ],
)
def test_a_bad_sample_is_named_and_nothing_stays(
    tmp_path: Path, workers: int, odd: np.ndarray | None, message: str
) -> None:
    images, columns = random_set(1000, (8, 8, 1))
    before, threads = segments(), set(threading.enumerate())
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "set.beton", Samples(images, 333, odd), **columns, workers=workers)
    assert os.listdir(tmp_path) == []
    assert segments() <= before and set(threading.enumerate()) == threads


@pytest.mark.timeout(200)
def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    images, columns = random_set(64, (8, 8, 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))  # amid the second image
    try:
        with pytest.raises((OSError, ValueError)):
            write(tmp_path / "set.beton", images, **columns)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.timeout(200)
def test_a_kill_leaves_no_file_of_the_final_name(tmp_path: Path) -> None:
    program = """if True:
        import sys, time
        import numpy as np
        from ffcv_writers import write
        class Slow:
            def __len__(self):
                return 1000
            def __getitem__(self, number):
                if number == 500:
                    print("half", flush=True)
                    time.sleep(60)
                return np.zeros((8, 8, 1), np.uint8)
        names = np.arange(1000)
        write(sys.argv[1], Slow(), labels=names, synthetic=0 * names, index=names)
    """
    before = segments()
    path = tmp_path / "set.beton"
    child = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not path.exists() and segments() <= before
    images, columns = random_set(50, (8, 8, 1))  # the next run clears what is left
    write(path, images, **columns)
    assert os.listdir(tmp_path) == [path.name] and len(open_set([path])) == 50


def test_a_second_writer_of_a_file_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    images, columns = random_set(40, (8, 8, 1))

    class Meddled(Samples):
        def __getitem__(self, number: int) -> np.ndarray:
            if number == 20:
                with pytest.raises(ValueError, match=r"set\.beton\.partial: another process writes it; wait for it"):
                    write(tmp_path / "set.beton", images, **columns)
            return super().__getitem__(number)

    write(tmp_path / "set.beton", Meddled(images, -1), **columns)
    np.testing.assert_array_equal(open_set([tmp_path / "set.beton"]).take(np.arange(40)), images)
    assert os.listdir(tmp_path) == ["set.beton"]


def cut(end: int) -> Callable[[bytearray], bytes]:
    return lambda content: bytes(content[:end])


def overwrite(offset: int, new: bytes) -> Callable[[bytearray], bytes]:
    def damage(content: bytearray) -> bytes:
        start = offset % len(content)
        content[start : start + len(new)] = new
        return bytes(content)

    return damage


FIRST_POINTER = 24 + 4 * 1041  # in a .beton, after the header and four field descriptors
DAMAGES = {
    "emptied": cut(0),
    "cut in the header": cut(10),
    "cut in the descriptors": cut(3000),
    "cut in the metadata": cut(5000),
    "cut by a byte": cut(-1),
    "cut in the last table": cut(-2000),
    "another format": lambda content: b"not a set at all" * 1000,
    "another version": overwrite(0, b"\xff\xff"),
    "a pointer out of range": overwrite(FIRST_POINTER, b"\xff" * 8),
    "an image too large": overwrite(-8, b"\xff\xff"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[bytearray], bytes]) -> None:
    images, columns = random_set(100, (8, 8, 1))
    path = tmp_path / "set.beton"
    write(path, images, **columns)
    path.write_bytes(damage(bytearray(path.read_bytes())))
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(path))} is damaged.*: if a run wrote it, delete it and run the"
    ):
        open_set([path])


def test_refusals(tmp_path: Path) -> None:
    images, columns = random_set(20, (8, 8, 1))
    path = tmp_path / "set.beton"
    with pytest.raises(ValueError, match="no samples"):
        write(path, images[:0], **{name: values[:0] for name, values in columns.items()})
    with pytest.raises(ValueError, match="jpg needs 3 channels"):
        write(path, images, **columns, storage="jpg")
    with pytest.raises(ValueError, match="label must be 20 integers"):
        write(path, images, **(columns | {"labels": columns["labels"][:19]}))
    with pytest.raises(ValueError, match="index must be 20 integers"):
        write(path, images, **(columns | {"index": columns["index"] / 2}))
    with pytest.raises(ValueError, match="synthetic must be 0 or 1"):
        write(path, images, **(columns | {"synthetic": columns["synthetic"] + 1}))
    with pytest.raises(ValueError, match=r"must end in \.beton"):
        write(tmp_path / "set.zip", images, **columns)
    assert os.listdir(tmp_path) == []

    write(path, images, **columns)
    wider, more = random_set(20, (8, 9, 1))
    write(tmp_path / "wider.beton", wider, **more)
    with pytest.raises(ValueError, match=r"wider.*8(, | x )9.*set.*8(, | x )8"):
        open_set([path, tmp_path / "wider.beton"])
    with pytest.raises(ValueError, match=r"none.* does not exist"):
        open_set([path, tmp_path / "none.beton"])
    loader = Loader(open_set([path]), 4)
    for order in ([0, 20], [-1], [0.5], [[0, 1]]):
        with pytest.raises(ValueError, match="order"):
            loader.batches(np.array(order))
    with pytest.raises(ValueError, match="2 draws have positions of shape"):
        loader.batches(np.arange(2), np.arange(3))


class Counted:
    """Files of which it is counted how often each is read."""

    def __init__(self, contents: list[bytes]) -> None:
        self.contents, self.reads = contents, [0] * len(contents)

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, number: int) -> bytes:
        self.reads[number] += 1
        return self.contents[number]


@pytest.mark.parametrize("storage", ["raw", "jpg"])
@pytest.mark.parametrize("transform", [None, partial(limit_shorter_side, size=100), partial(centre_square, size=32)])
def test_every_sample_is_read_and_decoded_once(tmp_path: Path, storage: Any, transform: Any, monkeypatch: Any) -> None:
    """Where TurboJPEG complains about a file, Pillow has the second word."""
    pictures = [Image.fromarray(np.full((90 + n, 120, 3), n, np.uint8)) for n in range(70)]
    contents = []
    for number, picture in enumerate(pictures):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG" if number % 3 == 0 else "JPEG")
        contents.append(buffer.getvalue())
    samples, decoded = Counted(contents), []
    for name in ("decode_jpeg", "decode_rgb"):
        decode = getattr(encoding, name)
        monkeypatch.setattr(encoding, name, lambda content, decode=decode: decoded.append(1) or decode(content))
    names, ticks = np.arange(70), iter(range(70))
    write(
        tmp_path / "set.beton", samples, labels=names, synthetic=0 * names, index=names, storage=storage,
        transform=transform, workers=3, progress=lambda: next(ticks),
    )  # fmt: skip
    assert samples.reads == [1] * 70 and len(decoded) == 70 and next(ticks, None) is None
