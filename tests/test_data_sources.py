"""The formats that images come in, each against files written here or the real ones."""

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

from diffult.data import DataConfig
from diffult.data.config import FASHION_MNIST_PATH
from diffult.data.sources import load_source
from diffult.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
CIFAR_JPEG = SHARED / "cifar10-jpeg.tar.gz"
IMAGENET = SHARED / "imagenet-sample-400.tar"


# digits


def test_digits_are_scaled_and_split_for_good() -> None:
    source = load_source(DataConfig(source="digits", image_size=8, channels=1))
    assert (len(source.train), len(source.test), source.val) == (1078, 719, None)
    assert source.train.shape == (8, 8, 1) and source.train.classes == tuple("0123456789")
    assert np.ptp(source.test.counts()) <= 4  # stratified
    both = np.concatenate([source.train.load(), source.test.load()])
    assert (both.min(), both.max()) == (0, 255)
    mine = sorted(map(bytes, np.rint(both.reshape(1797, 64) / 255 * 16).astype(np.uint8)))
    assert mine == sorted(map(bytes, load_digits().data.astype(np.uint8)))  # each image once
    again = load_source(DataConfig(source="digits", image_size=8, channels=1, seed=9))
    assert np.array_equal(again.test.load(), source.test.load())


@pytest.mark.parametrize(("size", "channels", "message"), [(32, 1, "digits images are 8x8"), (8, 3, "have 1 channel")])
def test_images_of_another_shape_than_configured_are_refused(size: int, channels: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_source(DataConfig(source="digits", image_size=size, channels=channels))


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


def idx_config(folder: Path) -> DataConfig:
    return DataConfig(source="idx", path=str(folder), image_size=28, channels=1)


@pytest.mark.parametrize("compress", [True, False])
def test_idx_round_trip(tmp_path: Path, compress: bool) -> None:
    arrays = write_idx(tmp_path, compress)
    source = load_source(idx_config(tmp_path))
    assert np.array_equal(source.train.load()[..., 0], arrays["train-images-idx3-ubyte"])
    assert np.array_equal(source.test.load()[..., 0], arrays["t10k-images-idx3-ubyte"])
    assert source.test.labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    assert source.train.classes == ("0", "1", "2")
    assert source.test.load().flags.writeable  # torch.from_numpy warns otherwise


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-5], "should hold 23520 values by its header, not 23515"),
        ("train-images-idx3-ubyte", lambda b: b"\0\0\x0d\x03" + b[4:], "not an IDX file of uint8 with 3"),
        ("t10k-labels-idx1-ubyte", lambda b: b"", "not an IDX file"),
        ("t10k-labels-idx1-ubyte", lambda b: idx_bytes(np.zeros(11)), "12 images but 11 labels"),
        ("t10k-labels-idx1-ubyte", lambda b: idx_bytes(np.arange(12) % 4), "label 3 in the test split"),
        (
            "t10k-labels-idx1-ubyte",
            lambda b: idx_bytes(np.arange(12) % 2),
            "class 2 has no image in the test",
        ),
        ("t10k-images-idx3-ubyte", lambda b: idx_bytes(np.zeros((12, 9, 9))), r"test images are \(9, 9, 1\)"),
    ],
)
def test_bad_idx_is_refused(tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str) -> None:
    write_idx(tmp_path, compress=False)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(UserError, match=message):
        load_source(idx_config(tmp_path))


def test_missing_or_broken_idx_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder$"):
        load_source(idx_config(tmp_path / "nowhere"))
    write_idx(tmp_path, compress=True)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(labels.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"cannot read .*train-labels-idx1-ubyte\.gz"):
        load_source(idx_config(tmp_path))
    labels.unlink()
    with pytest.raises(UserError, match=r"no train-labels-idx1-ubyte\.gz or train-labels-idx1-ubyte in"):
        load_source(idx_config(tmp_path))
    monkeypatch.setattr("diffult.data.idx.FASHION_MNIST_PATH", str(tmp_path / "debian"))
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        load_source(idx_config(tmp_path / "debian"))


@pytest.mark.skipif(
    not Path(FASHION_MNIST_PATH).is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_itself() -> None:
    source = load_source(DataConfig(source="idx", image_size=28, channels=1))
    assert source.train.counts().tolist() == [6000] * 10 and source.test.counts().tolist() == [1000] * 10
    assert source.test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert source.train.load().mean() / 255 == pytest.approx(0.2860, abs=1e-4)  # the known mean of the set


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
        source = load_source(DataConfig(source=name, path=str(path)))
        assert np.array_equal(source.train.load(), images)
        assert source.train.labels.tolist() == labels
        assert source.train.classes[3] == "name3"
        assert len(source.test) == len(source.train.classes) + 2


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
        (pickle.dumps({"data": np.array([b"x", None])}), r"not a CIFAR pickle \(UnpicklingError\)"),
        (b"\x80\x02}(U\x04da", "not a CIFAR pickle"),
        (pickle.dumps([1, 2]), "no dictionary"),
        (pickle.dumps({"labels": [0]}), "no 'data' of uint8"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}), "no list 'labels'"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "2 images but 1 labels"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}), r"integers in 0\.\.9"),
    ],
)
def test_bad_cifar_pickles_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    pickled = {file: python2_pickle(value) for file, value in cifar_files("cifar10")[0].items()}
    place = write_cifar(tmp_path, "cifar10", False, pickled | {"data_batch_2": content})
    with pytest.raises(UserError, match=message) as error:
        load_source(DataConfig(source="cifar10", path=str(place)))
    assert str(error.value).startswith(f"{place}: data_batch_2 ")


def test_missing_or_wrong_cifar_archives_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is neither cifar-10-python\.tar\.gz nor cifar-10-batches-py"):
        load_source(DataConfig(source="cifar10", path=str(tmp_path / "nowhere")))
    pickled = {file: python2_pickle(value) for file, value in cifar_files("cifar100")[0].items()}
    path = write_cifar(tmp_path, "cifar100", True, pickled)
    with pytest.raises(UserError, match="has no file cifar-10-batches-py/data_batch_1"):
        load_source(DataConfig(source="cifar10", path=str(path)))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cannot read .*cifar-100-python\.tar\.gz"):
        load_source(DataConfig(source="cifar100", path=str(path)))
    folder = write_cifar(tmp_path, "cifar100", False, pickled)
    (folder / "test").unlink()
    with pytest.raises(UserError, match="has no file test"):
        load_source(DataConfig(source="cifar100", path=str(folder)))
