"""Formats of arrays, each against files written here or the real ones."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffult.data.config import FASHION_MNIST_PATH
from ffcv_writers import SourceError
from ffcv_writers.readers import guess_format, open_source

# digits


def test_digits_are_scaled_and_split_for_good() -> None:
    source = open_source("digits", "")
    train, test = source.splits["train"], source.splits["test"]
    assert (len(train.labels), len(test.labels), len(source.splits)) == (1078, 719, 2)
    assert train.samples.shape[1:] == (8, 8, 1) and source.classes == tuple("0123456789")  # type: ignore[attr-defined]
    assert np.ptp(np.bincount(test.labels)) <= 4  # stratified
    both = np.concatenate([np.asarray(train.samples), np.asarray(test.samples)])
    assert (both.min(), both.max()) == (0, 255)
    mine = sorted(map(bytes, np.rint(both.reshape(1797, 64) / 255 * 16).astype(np.uint8)))
    assert mine == sorted(map(bytes, load_digits().data.astype(np.uint8)))  # each image once
    assert np.array_equal(np.asarray(open_source("digits", "").splits["test"].samples), np.asarray(test.samples))


# idx


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def write_idx(folder: Path, compress: bool) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = {}
    for split, size in {"train": 30, "t10k": 12}.items():
        arrays[f"{split}-images-idx3-ubyte"] = generator.integers(0, 256, (size, 28, 28))
        arrays[f"{split}-labels-idx1-ubyte"] = np.arange(size) % 3
    for name, values in arrays.items():
        content = idx_bytes(values)
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return arrays


@pytest.mark.parametrize("compress", [True, False])
def test_idx_round_trip(tmp_path: Path, compress: bool) -> None:
    arrays = write_idx(tmp_path, compress)
    source = open_source("idx", tmp_path)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = source.splits[split].samples, source.splits[split].labels
        assert np.array_equal(np.asarray(images)[..., 0], arrays[f"{prefix}-images-idx3-ubyte"])
        assert labels.tolist() == arrays[f"{prefix}-labels-idx1-ubyte"].tolist() and labels.dtype == np.int64
    assert source.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-5], "should hold 23520 values by its header, not 23515"),
        ("train-images-idx3-ubyte", lambda b: b"\0\0\x0d\x03" + b[4:], "not an IDX file of uint8 with 3"),
        ("t10k-labels-idx1-ubyte", lambda b: b"", "not an IDX file"),
        ("t10k-labels-idx1-ubyte", lambda b: idx_bytes(np.zeros(11)), "12 images but 11 labels"),
    ],
)
def test_bad_idx_is_refused(tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str) -> None:
    write_idx(tmp_path, compress=False)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(SourceError, match=message):
        open_source("idx", tmp_path).splits  # noqa: B018


def test_idx_files_are_found_with_a_dot_and_unpacked_by_their_content(tmp_path: Path) -> None:
    """As other sites name them, and as a browser leaves them that unpacks on the way."""
    write_idx(tmp_path, compress=False)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    before = open_source("idx", tmp_path).splits["train"]
    images.rename(tmp_path / "train-images.idx3-ubyte")
    labels.rename(tmp_path / "train-labels-idx1-ubyte.gz")
    assert guess_format(tmp_path) == "idx"
    after = open_source("idx", tmp_path).splits["train"]
    assert np.array_equal(np.asarray(after.samples), np.asarray(before.samples))
    assert after.labels.tolist() == before.labels.tolist()


def test_missing_or_broken_idx_files_are_named(tmp_path: Path) -> None:
    write_idx(tmp_path, compress=True)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(labels.read_bytes()[:-3])
    with pytest.raises(SourceError, match=r"cannot read .*train-labels-idx1-ubyte\.gz"):
        open_source("idx", tmp_path).classes  # noqa: B018
    labels.unlink()
    with pytest.raises(SourceError, match=r"no train-labels-idx1-ubyte\.gz or train-labels-idx1-ubyte in"):
        open_source("idx", tmp_path)


@pytest.mark.skipif(
    not Path(FASHION_MNIST_PATH).is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_itself() -> None:
    splits = open_source("idx", FASHION_MNIST_PATH).splits
    assert np.bincount(splits["train"].labels).tolist() == [6000] * 10
    assert np.bincount(splits["test"].labels).tolist() == [1000] * 10
    assert splits["test"].labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert np.asarray(splits["train"].samples).mean() / 255 == pytest.approx(0.2860, abs=1e-4)  # as is known


# CIFAR archives


def python2_pickle(value: Any) -> bytes:
    """Protocol 2 as Python 2's cPickle writes it: byte strings, and an array by numpy.core.multiarray."""

    def string(content: bytes) -> bytes:
        if len(content) < 256:
            return b"U" + bytes([len(content)]) + content
        return b"T" + struct.pack("<i", len(content)) + content

    def emit(value: Any) -> bytes:
        if isinstance(value, str):
            return string(value.encode())
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(emit, value)) + b"e"
        if isinstance(value, dict):
            return b"}(" + b"".join(emit(key) + emit(item) for key, item in value.items()) + b"u"
        assert isinstance(value, np.ndarray) and value.ndim == 2
        shape = emit(value.shape[0]) + emit(value.shape[1]) + b"\x86"
        dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
        dtype += b"(K\x03" + string(b"|") + b"NNN" + emit(-1) + emit(-1) + b"K\x00tb"
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
        return empty + b"(K\x01" + shape + dtype + b"\x89" + string(value.tobytes()) + b"tb"

    return b"\x80\x02" + emit(value) + b"."


NAMES = {"cifar10": "cifar-10", "cifar100": "cifar-100"}


def cifar_files(name: str) -> tuple[dict[str, Any], np.ndarray, list[int]]:
    """Contents of a small archive; the training images uint8 (N, 32, 32, 3) and labels that it stands for."""
    classes = 10 if name == "cifar10" else 100
    parts = [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]
    test, meta = ("test_batch", "batches.meta") if classes == 10 else ("test", "meta")
    size = classes + 2
    generator = np.random.default_rng(0)
    files: dict[str, Any] = {}
    images, labels = [], []
    for part in [*parts, test]:
        pixels = generator.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        numbers = [int(i) for i in generator.permutation(np.arange(size) % classes)]
        planes = pixels.transpose(0, 3, 1, 2).reshape(size, 3072)
        if classes == 10:
            files[part] = {
                "batch_label": part,
                "labels": numbers,
                "data": planes,
                "filenames": ["a.png"] * size,
            }
        else:
            files[part] = {"fine_labels": numbers, "coarse_labels": [0] * size, "data": planes}
        if part != test:
            images.append(pixels)
            labels += numbers
    key = "label_names" if classes == 10 else "fine_label_names"
    files[meta] = {key: [f"name{i}" for i in range(classes)], "num_vis": 3072}
    return files, np.concatenate(images), labels


def write_cifar(root: Path, name: str, as_tar: bool, pickled: dict[str, bytes]) -> Path:
    """The archive's folder or its .tar.gz, under its own name in `root`."""
    folder = "cifar-10-batches-py" if name == "cifar10" else "cifar-100-python"
    if not as_tar:
        (root / folder).mkdir()
        for file, content in pickled.items():
            (root / folder / file).write_bytes(content)
        return root / folder
    path = root / f"{NAMES[name]}-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for file, content in pickled.items():
            member = tarfile.TarInfo(f"{folder}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("as_tar", [True, False])
@pytest.mark.parametrize("dump", [python2_pickle, pickle.dumps])
def test_cifar_archives(tmp_path: Path, name: Any, as_tar: bool, dump: Callable[[Any], bytes]) -> None:
    files, images, labels = cifar_files(name)
    place = write_cifar(tmp_path, name, as_tar, {file: dump(content) for file, content in files.items()})
    for path in (place, place.parent):
        source = open_source(name, path)
        train, test = source.splits["train"], source.splits["test"]
        assert np.array_equal(np.asarray(train.samples), images)
        assert train.labels.tolist() == labels
        assert source.classes[3] == "name3"
        assert len(test.labels) == len(source.classes) + 2


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"data": Malicious()}), r"asks for (posix|nt)\.system"),
        (pickle.dumps({"data": Malicious()}, protocol=0), r"asks for (posix|nt)\.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", r"asks for builtins\.eval"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", r"asks for numpy\.ndarray\.tofile"),
        (pickle.dumps({"data": np.array([b"x", None])}), r"not a CIFAR pickle \(an array of type 'O8'\)"),
        (b"\x80\x02}(U\x04da", "not a CIFAR pickle"),
        (pickle.dumps([1, 2]), "no dictionary"),
        (pickle.dumps({"labels": [0]}), "no 'data' of uint8"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}), "no list 'labels'"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "2 images but 1 labels"),
        (
            pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}),
            r"row 0 is 10, not in 0\.\.9",
        ),
    ],
)
def test_bad_cifar_pickles_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    pickled = {file: python2_pickle(value) for file, value in cifar_files("cifar10")[0].items()}
    place = write_cifar(tmp_path, "cifar10", False, pickled | {"data_batch_2": content})
    with pytest.raises(SourceError, match=message) as error:
        open_source("cifar10", place).splits  # noqa: B018
    assert str(error.value).startswith(f"{place}: data_batch_2 ")


def test_missing_or_wrong_cifar_archives_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is neither cifar-10-python\.tar\.gz nor cifar-10-batches-py, and"):
        open_source("cifar10", tmp_path).splits  # noqa: B018
    pickled = {file: python2_pickle(value) for file, value in cifar_files("cifar100")[0].items()}
    path = write_cifar(tmp_path, "cifar100", True, pickled)
    with pytest.raises(SourceError, match="has no file cifar-10-batches-py/data_batch_1"):
        open_source("cifar10", path).splits  # noqa: B018
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SourceError, match=r"cannot read .*cifar-100-python\.tar\.gz"):
        open_source("cifar100", path).splits  # noqa: B018
    folder = write_cifar(tmp_path, "cifar100", False, pickled)
    (folder / "test").unlink()
    with pytest.raises(SourceError, match="has no file test"):
        open_source("cifar100", folder).splits  # noqa: B018
