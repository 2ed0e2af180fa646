"""Labels in arrays, pickles and archives: cast only where nothing changes, else refused with their row."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffcv_writers import SourceError
from ffcv_writers.readers import Split, guess_format, open_source
from ffcv_writers.readers.pickles import unpickle

IMAGES = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)


def opened(path: Path, **arrays: Any) -> dict[str, Split]:
    np.savez(path / "a.npz", **arrays)
    return open_source("npz", path / "a.npz").splits


@pytest.mark.parametrize("kind", [np.uint8, np.int16, ">i8", np.uint64, np.float16, np.float64])
def test_npz_labels_of_any_type_that_are_whole_numbers(tmp_path: Path, kind: Any) -> None:
    labels = np.array([0, 1, 1, 200]).astype(kind)
    for values in (labels, labels[:, None]):
        read = opened(tmp_path, images=IMAGES, labels=values)["train"].labels
        assert read.tolist() == [0, 1, 1, 200] and read.dtype == np.int64
    truth = np.array([True, False, True, True])
    assert opened(tmp_path, images=IMAGES, labels=truth)["train"].labels.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, np.nan, 2.0]), "the label of row 2 is nan, not an integer from 0 to 999999"),
        (np.array([0, 1.7, np.inf, 2.0]), r"row 1 is 1\.7, .* \(row 1 is the first of 2\)"),
        (np.array([2**63 + 1, 0, 1, 2], np.uint64), "row 0 is 9223372036854775809"),
        (np.array([0, 1, 2, -1]), "row 3 is -1"),
        (np.array([0, 1, 2, 10**6]), "row 3 is 1000000"),
        (np.array(["cat", "dog", "cat", "dog"]), "need a label an image, .* not <U3 of shape .*'cat'"),
        (np.eye(4), r"not float64 of shape \(4, 4\)"),
        (np.zeros(4, complex), "not complex128"),
        (np.zeros(4, "M8[s]"), "not datetime64"),
        (np.array(3), r"not int64 of shape \(\)"),
        (np.arange(3), "4 images but 3 labels"),
    ],
)
def test_other_npz_labels_are_refused_with_their_row(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    with pytest.raises(SourceError, match=message) as error:
        opened(tmp_path, images=IMAGES, labels=labels)
    assert str(error.value).startswith(str(tmp_path / "a.npz")) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"1 or 3 channels\), got uint8 \(4, 3, 8, 8\)"),
        ({"images": IMAGES / 255}, "got float64"),
        ({"images": IMAGES[:0], "labels": np.arange(0)}, r"got uint8 \(0, 8, 8, 3\)"),
        ({"train_images": IMAGES}, "has no array train_labels, but labels, train_images"),
        ({"images": IMAGES, "classes": np.array(["a", "b", "b", "c"])}, "classes must be different names"),
        ({"images": IMAGES, "classes": np.array(["a", "b"])}, "the label 3 has no name, classes has 2"),
    ],
)
def test_other_npz_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        opened(tmp_path, **({"labels": np.arange(4)} | arrays))


def test_a_test_split_without_labels_does_not_vanish_and_names_are_read(tmp_path: Path) -> None:
    train = {"train_images": IMAGES, "train_labels": np.arange(4)}
    with pytest.raises(SourceError, match="has no array test_labels"):
        opened(tmp_path, **train, test_images=IMAGES)
    names = [str(number) for number in (10, 9, 2, 1, 0)]  # one class more than there are images of
    np.savez(tmp_path / "b.npz", **train, classes=np.array(names))  # type: ignore[arg-type]
    assert open_source("npz", tmp_path / "b.npz").classes == tuple(names)
    np.savez(tmp_path / "b.npz", **train, classes=np.arange(4))  # type: ignore[arg-type]
    assert open_source("npz", tmp_path / "b.npz").classes == ("0", "1", "2", "3")
    np.save(tmp_path / "c.npy", IMAGES)
    for content in (b"", b"PK\3\4 no more", (tmp_path / "c.npy").read_bytes(), (tmp_path / "b.npz").read_bytes()[:-30]):
        (tmp_path / "b.npz").write_bytes(content)
        with pytest.raises(SourceError, match=r"cannot read .*b\.npz: .*must be a \.npz file of arrays"):
            open_source("npz", tmp_path / "b.npz").splits  # noqa: B018


# CIFAR archives that were pickled again

DATA = np.arange(20 * 3072).astype(np.uint8).reshape(20, 3072)
LABELS = [*range(10)] * 2
KINDS: dict[str, Callable[[list[int]], Any]] = {
    "list": lambda labels: labels,
    "tuple": tuple,
    "array": np.array,
    "column": lambda labels: np.array(labels)[:, None],
    "float32": lambda labels: np.array(labels, ">f4"),
    "float16": lambda labels: np.array(labels, np.float16),
    "scalars": lambda labels: list(np.array(labels)),
}


def write_cifar(folder: Path, content: Any, key: Callable[[str], Any], protocol: int) -> Path:
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({key("label_names"): [key(c) for c in "abcdefghij"]}, protocol))
    return folder


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("key", [str, str.encode])
def test_cifar_pickled_again_is_read_whatever_its_keys_labels_and_protocol(
    tmp_path: Path, key: Callable[[str], Any], protocol: int
) -> None:
    for kind in KINDS.values():
        for data in (DATA, np.asfortranarray(DATA)):
            content = {key("data"): data, key("labels"): kind(LABELS), key("filenames"): [key("x.png")] * 20}
            source = open_source("cifar10", write_cifar(tmp_path, content, key, protocol))
            test = source.splits["test"]
            assert source.classes == tuple("abcdefghij") and test.labels.tolist() == LABELS
            planes = np.asarray(test.samples).transpose(0, 3, 1, 2).reshape(20, 3072)
            np.testing.assert_array_equal(planes, DATA)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, *LABELS[1:]], r"data_batch_1 'labels': the label of row 0 is 0\.5"),
        ([*LABELS[:-1], -1], "the label of row 19 is -1"),
        ([*LABELS[:-1], 10], r"the label of row 19 is 10, not in 0\.\.9"),
        ([*LABELS[:-1], 2**70], "not object"),
        (["cat"] * 20, "need a label an image"),
        ([[0]] * 19 + [[0, 1]], "data_batch_1 'labels'"),
        ("cat", "no list 'labels'"),
        ([], "no list 'labels'"),
    ],
)
def test_other_cifar_labels_are_refused(tmp_path: Path, labels: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source("cifar10", write_cifar(tmp_path, {"data": DATA, "labels": labels}, str, 4)).splits  # noqa: B018


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r\xff\xff\xff\xff.",  # a memo of 64 GB
        b"}p99999999999\n.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00.",  # a string of 2^56 bytes
        b"\x80\x02cnumpy\nndarray\n)R(K\x01J\xff\xff\xff\x7fK\x04\x86NK\x00U\x00tb.",
        pickle.dumps(np.array([b"x", None])),
        pickle.dumps(np.zeros(2, "U3")),
        pickle.dumps(np.zeros(2, [("a", "i4")])),
    ],
)
def test_a_pickle_that_asks_for_too_much_is_refused(content: bytes) -> None:
    with pytest.raises(SourceError, match="x is not a CIFAR pickle"):
        unpickle(content, "x")


# WebDataset


def tar_of(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """Files, or links where the content is text; with * before it a hard link."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type = tarfile.LNKTYPE if content[0] == "*" else tarfile.SYMTYPE
                member.linkname = content.removeprefix("*")
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def test_links_in_an_archive_are_followed_and_what_is_passed_over_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [
        ("a/0.png", b"zero"), ("a/0.cls", b"0"), ("a/1.png", "*a/0.png"), ("a/1.cls", b" 1\n"),
        ("b/2.png", "../a/0.png"), ("b/2.cls", "../a/1.cls"), ("b/._2.png", b""), ("b/3.v2.png", b"x"),
        ("b/4.json", b"{}"),
    ]  # fmt: skip
    tar_of(tmp_path / "train-0.tar", *members)
    tar_of(tmp_path / "more.tar", *members)
    train = open_source("tar", tmp_path).splits["train"]
    assert [train.samples[i] for i in range(3)] == [b"zero"] * 3 and train.labels.tolist() == [0, 1, 1]
    assert "skipped 1 image with more than one dot" in caplog.text
    assert "not read, as of no split: 1 archive, such as" in caplog.text and "more.tar" in caplog.text


@pytest.mark.parametrize(
    "label", [b"1_0", b"+3", b"-1", b"1.0", b"cat", b"", b"1000000", b"\xd9\xa3", b"1" * 99, b"1%99d" % 2]
)
def test_a_cls_that_is_no_number_is_refused(tmp_path: Path, label: bytes) -> None:
    tar_of(tmp_path / "a.tar", ("0.png", b""), ("0.cls", label))
    with pytest.raises(SourceError, match=r"a\.tar: 0\.cls: the label is not an integer from 0 to 999999"):
        open_source("tar", tmp_path / "a.tar").splits  # noqa: B018


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.png", b""), ("0.jpg", b""), ("0.cls", b"1")], r"0 has two images, 0\.jpg the second"),
        ([("0.png", b""), ("0.cls", b"1"), ("0.cls", b"2")], r"0 has two \.cls files"),
        ([("0.png", b""), ("1.cls", b"1"), ("1.png", "nowhere.png")], "0 needs an image and a .*; 1 more like it"),
        ([("x/0.txt", b"")], "holds no images"),
    ],
)
def test_no_image_of_an_archive_vanishes(tmp_path: Path, members: list[Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source("tar", tar_of(tmp_path / "a.tar", *members)).splits  # noqa: B018


def test_an_archive_that_is_cut_or_joined_to_another_is_refused(tmp_path: Path) -> None:
    content = tar_of(tmp_path / "a.tar", *((f"{n}.{e}", b"1") for n in range(3) for e in ("png", "cls"))).read_bytes()
    for changed, message in (
        (content[:4096], "cut short: its end mark is not there"),
        (content[:4000], r"cannot read .*a\.tar"),
        (content + content, "more lies behind its end mark"),
        (content[:4106] + b"?" + content[4107:], "damaged at byte 4096"),
    ):
        (tmp_path / "a.tar").write_bytes(changed)
        with pytest.raises(SourceError, match=message):
            open_source("tar", tmp_path / "a.tar").splits  # noqa: B018


def test_cifar_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, {"data": DATA, "labels": LABELS}, str, 4)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghia")}))
    with pytest.raises(SourceError, match=r"batches\.meta 'label_names' has 'a' twice"):
        open_source("cifar10", folder).splits  # noqa: B018


@pytest.mark.parametrize("name", ["a.tgz", "a.tar.gz", "A.TAR.XZ"])
def test_a_compressed_archive_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(SourceError, match="is compressed: unpack it"):
        guess_format(tmp_path / name)
