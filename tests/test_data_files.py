"""Image folders and image lists."""

from __future__ import annotations

import logging
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffult.data import DataConfig, FileImages, load_data
from diffult.data.sources import load_source
from diffult.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
CIFAR_JPEG = SHARED / "cifar10-jpeg.tar.gz"
IMAGENET = SHARED / "imagenet-sample-400.tar"


def write_image(path: Path, value: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path, format="PNG")


# Folders


def write_folder(root: Path, splits: tuple[str, ...] = ("train", "test")) -> None:
    """Classes `ant` (3 files), `bee` (2) and `cat` (1) in each split; the grey value is the class."""
    for split in splits:
        for label, (name, count) in enumerate({"ant": 3, "bee": 2, "cat": 1}.items()):
            for i in range(count):
                write_image(root / split / name / f"{i}{('.png', '.JPG', '.jpeg')[i]}", label)


def folder_config(root: Path) -> DataConfig:
    return DataConfig(source="folder", path=str(root), image_size=8)


def test_folder_classes_are_sorted_and_files_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, ("train", "test", "val"))
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "ant" / ".hidden.png").write_text("")
    (tmp_path / "train" / "bee" / "notes.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        source = load_source(folder_config(tmp_path))
    assert "passed over 1 files" in caplog.text
    assert source.val is not None
    for split in (source.train, source.test, source.val):
        assert split.classes == ("ant", "bee", "cat")
        assert split.counts().tolist() == [3, 2, 1]
        assert split.load()[:, 0, 0, 0].tolist() == split.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert isinstance(source.train, FileImages)
    assert [Path(path).name for path in source.train.paths[:3]] == ["0.png", "1.JPG", "2.jpeg"]


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere/train"):
        load_source(folder_config(tmp_path / "nowhere"))
    write_folder(tmp_path, ("train",))
    with pytest.raises(UserError, match=r"no folder .*/test"):
        load_source(folder_config(tmp_path))
    write_folder(tmp_path, ("test",))
    write_image(tmp_path / "test" / "dog" / "0.png", 3)
    with pytest.raises(UserError, match=r"test and the train folder .* only one has dog"):
        load_source(folder_config(tmp_path))
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"class dog has no image in .*train/dog"):
        load_source(folder_config(tmp_path))
    with pytest.raises(UserError, match="folder images have 3 channel"):
        write_image(tmp_path / "train" / "dog" / "0.png", 3)
        load_source(folder_config(tmp_path).model_copy(update={"channels": 1}))


def test_an_image_that_does_not_decode_is_named_before_any_work(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = load_data(folder_config(tmp_path))
    data.check()
    (tmp_path / "test" / "bee" / "1.JPG").write_bytes(b"\xff\xd8\xff\xe0 no more")
    with pytest.raises(UserError, match=r"cannot decode .*test/bee/1\.JPG: "):
        data.check()


@pytest.mark.skipif(not CIFAR_JPEG.exists(), reason=f"no {CIFAR_JPEG}")
def test_real_cifar_files_as_a_folder(tmp_path: Path) -> None:
    """40 files of the first two classes, 10 of them as test split: unpacking all would take too long."""
    pixels = {}
    with tarfile.open(CIFAR_JPEG) as archive:
        for member in archive:
            stream = archive.extractfile(member)
            if stream is None:  # a folder
                continue
            _, name, file = member.name.split("/")
            if name not in ("airplane", "automobile"):
                break
            if int(file[:4]) < 40:
                path = tmp_path / ("test" if int(file[:4]) < 10 else "train") / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(stream.read())
                with Image.open(path) as image:
                    pixels[str(path)] = np.array(image)
    config = DataConfig(
        source="folder", path=str(tmp_path), profile="exponential", n_max=20, imbalance=4, val_per_class=5
    )
    data = load_data(config)
    data.check()
    assert data.train.counts().tolist() == [20, 5] and data.test.counts().tolist() == [10, 10]
    assert isinstance(data.train, FileImages)
    assert np.array_equal(data.train.load(), np.stack([pixels[path] for path in data.train.paths]))


# Lists


def list_config(root: Path, train: str, test: str, val: str = "", size: int = 8) -> DataConfig:
    """A list configuration with these texts as lists."""
    paths = {}
    for name, text in {"train_list": train, "test_list": test, "val_list": val}.items():
        if text:
            (root / f"{name}.txt").write_text(text)
        paths[name] = str(root / f"{name}.txt") if text else ""
    return DataConfig(source="list", path=str(root), image_size=size, **paths)  # type: ignore[arg-type]


def test_list_with_spaces_in_paths_and_a_validation_list(tmp_path: Path) -> None:
    for i, name in enumerate(["a/one two.png", "b.png", "c 1.png", "dé.png"]):
        write_image(tmp_path / name, i)
    train = "\ufeffa/one two.png 1\r\nb.png 0\n\nc 1.png\t2\ndé.png 0"
    source = load_source(list_config(tmp_path, train, "b.png 0\nb.png 1\nb.png 2\n", "b.png 2\nb.png 1\nb.png 0\n"))
    assert source.train.labels.tolist() == [1, 0, 2, 0]
    assert source.train.load()[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert source.train.classes == ("0", "1", "2")
    assert source.val is not None and source.val.labels.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            "a.png 0\nb.png\n",
            "a.png 0\n",
            r"train_list\.txt:2: a line must be 'relative/path label', not 'b\.png'",
        ),
        (
            "a.png 0\n\nb.png -1\n",
            "a.png 0\n",
            r"train_list\.txt:3: the label is not an integer from 0 but '-1'",
        ),
        ("a.png 0\nb.png 1.5\n", "a.png 0\n", r"train_list\.txt:2: .*'1\.5'"),
        ("a.png 99999999999999999999\n", "a.png 0\n", r"train_list\.txt:1: "),
        ("a.png 0\nb.png 2\n", "a.png 0\n", r"train_list\.txt: class 1 has no image"),
        ("a.png 0\nb.png 0\nc.png 2\n", "a.png 0\n", r"train_list\.txt: class 1 has no image"),
        ("a.png 0\nb.png 1\n", "a.png 0\na.png 1\nb.png 2\n", r"test_list\.txt:3: label 2 is not in 0\.\.1"),
        ("a.png 0\nb.png 1\n", "a.png 0\n", r"test_list\.txt: class 1 has no image"),
        ("a.png 0\n", "\n", r"test_list\.txt has no lines"),
    ],
)
def test_bad_lists_are_refused_by_file_and_line(tmp_path: Path, train: str, test: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_source(list_config(tmp_path, train, test))
    assert "\n" not in str(error.value)


def test_missing_list_or_root_is_named(tmp_path: Path) -> None:
    config = list_config(tmp_path, "a.png 0", "a.png 0")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_source(config.model_copy(update={"path": str(tmp_path / "nowhere")}))
    (tmp_path / "test_list.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read the list .*test_list\.txt: No such file"):
        load_source(config)


def test_a_listed_file_that_does_not_decode_is_told_with_its_line(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0)
    (tmp_path / "b.png").write_text("no image")
    lines = "a.png 0\n\na.png 0\na.png 1\nb.png 0\na.png 1\n"
    config = list_config(tmp_path, lines, "a.png 0\na.png 1\n")
    with pytest.raises(UserError, match=r"b\.png \(.*train_list\.txt:5\): not an image"):
        load_data(config).check()
    drawn = load_data(config.model_copy(update={"profile": "counts", "counts": (3, 1)}))  # other positions
    with pytest.raises(UserError, match=r"train_list\.txt:5\)"):
        drawn.train.check()


def test_a_list_of_imagenet_lt_size_loads_in_two_seconds(tmp_path: Path) -> None:
    labels = np.concatenate([np.arange(1000), np.random.default_rng(0).integers(0, 1000, 114846)])
    text = "".join(f"train/n01440764/n01440764_{i}.JPEG {label}\n" for i, label in enumerate(labels))
    config = list_config(tmp_path, text, "".join(f"val/{i}.JPEG {i}\n" for i in range(1000)))
    start = time.perf_counter()
    source = load_source(config)
    assert time.perf_counter() - start < 2
    assert np.array_equal(source.train.labels, labels) and len(source.train.classes) == 1000


@pytest.mark.skipif(not IMAGENET.exists(), reason=f"no {IMAGENET}")
def test_real_imagenet_files_as_a_list(tmp_path: Path) -> None:
    with tarfile.open(IMAGENET) as archive:
        archive.extractall(tmp_path, filter="data")
    names = sorted(path.name for path in tmp_path.glob("*.JPEG"))
    lines = "".join(f"{name} {i % 4}\n" for i, name in enumerate(names))
    data = load_data(list_config(tmp_path, lines, lines, size=64))
    data.train.check()
    grey = []
    for i, name in enumerate(names):
        with Image.open(tmp_path / name) as image:
            if image.mode == "L":
                grey.append(i)
    assert len(names) == 400 and len(grey) == 8
    images = data.train.subset(np.array([*grey, 0, 1])).load()
    assert images.shape == (10, 64, 64, 3)
    assert np.ptp(images[:8], axis=-1).max() == 0 < np.ptp(images[8:], axis=-1).max()
