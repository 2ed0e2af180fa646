"""Packing: every source to .beton files that hold what its files show, each decoded once, whole or not at all."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from diffult.data import packing
from diffult.data.config import DataConfig
from diffult.data.packing import open_data, pack_images, read_packed, source_differences
from diffult.errors import UserError
from ffcv_writers import CenterCrop, Loader, encoding
from ffcv_writers.readers import open_source


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_image(path: Path, value: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path, format="PNG")


def pixels(image_set: Any) -> np.ndarray:
    return image_set.take(np.arange(len(image_set)))


def write_packed(config: DataConfig, folder: Path) -> dict[str, Any]:
    return pack_images(config, open_data(config), folder)


def pack(config: DataConfig, folder: Path) -> Any:
    write_packed(config, folder / "pack")
    return read_packed(folder / "pack")


# Folders


def write_folder(root: Path, splits: tuple[str, ...] = ("train", "test")) -> None:
    """Classes `ant` (3 files), `bee` (2) and `cat` (1) in each split; the grey value is the class."""
    for split in splits:
        for label, (name, count) in enumerate({"ant": 3, "bee": 2, "cat": 1}.items()):
            for i in range(count):
                write_image(root / split / name / f"{i}{('.png', '.JPG', '.jpeg')[i]}", label)


def folder_config(root: Path, **settings: Any) -> DataConfig:
    return DataConfig(source="folder", path=str(root), image_size=8, **settings)


def test_folder_classes_are_sorted_and_files_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "source"
    write_folder(root, ("train", "test", "val"))
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / ".hidden.png").write_text("")
    (root / "train" / "bee" / "notes.txt").write_text("")
    packed = pack(folder_config(root), tmp_path)
    assert "skipped 2 files: 1 hidden, 1 not named like an image (.txt)" in caplog.text
    assert packed.classes == ("ant", "bee", "cat") and packed.counts.tolist() == [3, 2, 1]
    for image_set in (packed.train, packed.test, packed.val):
        assert pixels(image_set)[:, 0, 0, 0].tolist() == image_set.labels.tolist() == [0, 0, 0, 1, 1, 2]
        assert image_set.index.tolist() == list(range(6)) and not image_set.synthetic.any()
    samples: Any = open_source("folder", root).splits["train"].samples
    assert [Path(samples.name(i)).name for i in range(3)] == ["0.png", "1.JPG", "2.jpeg"]
    assert sorted(os.listdir(tmp_path / "pack")) == ["packed.json", "test.beton", "train.beton", "val.beton"]


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    root, out = tmp_path / "source", tmp_path / "pack"
    with pytest.raises(UserError, match=r"data\.path .*source does not exist; give --set data.path=PATH"):
        write_packed(folder_config(root), out)
    write_folder(root, ("train",))
    with pytest.raises(UserError, match=r"source has no test split: a run needs train and test images"):
        write_packed(folder_config(root), out)
    write_folder(root, ("test",))
    write_image(root / "test" / "dog" / "0.png", 3)
    with pytest.raises(UserError, match=r"test and .*train must have the same classes, but only one has dog"):
        write_packed(folder_config(root), out)
    (root / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"class dog has no image in .*train/dog"):
        write_packed(folder_config(root), out)
    assert not out.exists()


def test_files_are_stored_as_grey_on_demand(tmp_path: Path) -> None:
    (tmp_path / "source" / "a").mkdir(parents=True)
    for i in range(3):
        picture(8, 8, i).save(tmp_path / "source" / "a" / f"{i}.png")
    packed = pack(folder_config(tmp_path / "source", channels=1, test_share=0.5), tmp_path)
    assert pixels(packed.train)[0, ..., 0].tolist() == (
        np.asarray(picture(8, 8, int(packed.train.index[0])).convert("L")).tolist()
    )


def test_one_folder_is_split_alike_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("one", "other"):
        for i, count in enumerate((20, 3, 2)):
            for j in range(count):
                write_image(tmp_path / name / "abc"[i] / f"{j}.png", 10 * j + i)
    one, other = (
        pack(folder_config(tmp_path / name, test_share=0.2), tmp_path / f"{name}-run") for name in ("one", "other")
    )
    assert one.counts.tolist() == [16, 2, 2]
    assert np.bincount(one.test.labels, minlength=3).tolist() == [4, 1, 0]  # a class of two gives none away
    assert one.fingerprint == other.fingerprint and pixels(one.test).tolist() == pixels(other.test).tolist()
    assert not {*pixels(one.test)[:, 0, 0, 0]} & {*pixels(one.train)[:, 0, 0, 0]}


def test_a_file_that_does_not_decode_is_named_and_nothing_stays(tmp_path: Path) -> None:
    root, out = tmp_path / "source", tmp_path / "pack"
    write_folder(root)
    write_packed(folder_config(root), out)
    (root / "test" / "bee" / "1.JPG").write_bytes(b"\xff\xd8\xff\xe0 no more")
    threads = set(threading.enumerate())
    with pytest.raises(UserError, match=r"test/bee/1\.JPG\) could not be read: .*; repair or remove the file") as error:
        write_packed(folder_config(root), out)
    assert "\n" not in str(error.value)
    assert os.listdir(out) == [] and set(threading.enumerate()) == threads
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(root / "test" / "bee" / "1.tiff")
    (root / "test" / "bee" / "1.JPG").unlink()
    with pytest.raises(UserError, match=r"1\.tiff\) could not be read: .*floating-point"):
        write_packed(folder_config(root), out)
    os.truncate(root / "train" / "ant" / "0.png", 45)
    with pytest.raises(UserError, match=r"train/ant/0\.png\) could not be read: "):
        write_packed(folder_config(root), out)


@pytest.mark.parametrize("storage", ["raw", "jpg"])
def test_every_file_is_read_and_decoded_once(tmp_path: Path, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the profile leaves out are not."""
    for split in ("train", "test"):
        for number in range(24):
            path = tmp_path / "source" / split / f"c{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(60 + number, 70 if split == "train" else 90, number).save(path)
    decoded: list[bytes] = []
    decode = encoding.decode_jpeg

    def counted(content: np.ndarray) -> np.ndarray:
        decoded.append(content.tobytes())
        return decode(content)

    monkeypatch.setattr(encoding, "decode_jpeg", counted)
    monkeypatch.setattr(encoding, "decode_rgb", lambda content: pytest.fail("decoded again"))
    config = DataConfig(
        source="folder", path=str(tmp_path / "source"), image_size=32, storage=storage, profile="step", n_max=8,
        imbalance=2, val_per_class=3,
    )  # fmt: skip
    packed = pack(config, tmp_path)
    numbers = [*(packed.train.index + 0), *(packed.val.index + 0), *(packed.test.index + 100)]
    assert len(set(numbers)) == len(numbers) == 12 + 6 + 24
    assert len(decoded) == len(set(decoded)) == len(numbers)


@pytest.mark.parametrize(("height", "width"), [(100, 75), (75, 101), (40, 333), (20, 31), (32, 45)])
def test_raw_images_are_torchvisions_to_the_bit(tmp_path: Path, height: int, width: int) -> None:
    image = picture(height, width)
    for split in ("train", "test"):
        (tmp_path / "source" / split / "a").mkdir(parents=True)
        image.save(tmp_path / "source" / split / "a" / "0.jpg", quality=90)
    packed = pack(DataConfig(source="folder", path=str(tmp_path / "source"), image_size=32), tmp_path)
    stored = Image.open(tmp_path / "source" / "train" / "a" / "0.jpg")
    expected = F.center_crop(F.resize(stored, [32], InterpolationMode.BICUBIC), [32])
    np.testing.assert_array_equal(packed.train.image(0), np.array(expected))


def test_every_colour_mode_becomes_rgb(tmp_path: Path) -> None:
    folder, colour = tmp_path / "source" / "train" / "a", picture(48, 40)
    folder.mkdir(parents=True)
    grey = colour.convert("L")
    colour.save(folder / "rgb.png")
    colour.convert("RGBA").save(folder / "rgba.png")
    colour.save(folder / "png-in-truth.jpg", format="PNG")
    grey.save(folder / "grey.png")
    grey.convert("LA").save(folder / "grey-alpha.png")
    Image.fromarray(np.array(grey).astype(np.uint16) * 257).save(folder / "grey16.png")
    colour.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    colour.quantize(64).save(folder / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees": left alone, as training on files does
    colour.save(folder / "turned.png", exif=exif)
    shutil.copytree(folder.parent, folder.parents[1] / "test")
    packed = pack(DataConfig(source="folder", path=str(folder.parents[1]), image_size=32), tmp_path)
    read = dict(zip(sorted(os.listdir(folder)), pixels(packed.train).astype(int), strict=True))
    assert np.ptp(read["grey.png"], axis=-1).max() == 0
    for name in ("rgba.png", "png-in-truth.jpg", "turned.png"):
        assert np.array_equal(read[name], read["rgb.png"])
    for name in ("grey-alpha.png", "grey16.png"):
        assert np.array_equal(read[name], read["grey.png"])
    assert np.abs(read["cmyk.jpg"] - read["rgb.png"]).mean() < 6  # inverted, as Adobe stores it, would be about 100
    assert np.abs(read["palette.png"] - read["rgb.png"]).mean() < 12


def test_jpg_keeps_small_files_and_scales_large_ones(tmp_path: Path) -> None:
    contents = {}
    for split in ("train", "test"):
        for name, size in {"a": (90, 60), "b": (300, 200)}.items():
            path = tmp_path / "source" / split / name / "0.jpg"
            path.parent.mkdir(parents=True)
            picture(*size).save(path)
            contents[name] = path.read_bytes()
    config = DataConfig(source="folder", path=str(tmp_path / "source"), image_size=32, storage="jpg", max_short_side=64)
    packed = pack(config, tmp_path)
    assert packed.train.encoded.all() and packed.train.sizes.tolist() == [[90, 60], [96, 64]]
    np.testing.assert_array_equal(packed.train.image(0), np.asarray(Image.open(io.BytesIO(contents["a"]))))
    (batch,) = Loader(packed.train, 2, crop=CenterCrop(32)).sequential()
    for number, name in enumerate("ab"):
        image = F.resize(Image.open(io.BytesIO(contents[name])), [32], InterpolationMode.BICUBIC)
        theirs = np.asarray(F.center_crop(image, [32])).astype(int)
        assert np.abs(batch.images[number].numpy() - theirs).mean() < 3


# Lists


def list_config(root: Path, train: str, test: str, val: str = "", size: int = 8) -> DataConfig:
    """A list configuration with these texts as lists."""
    paths = {}
    for name, text in {"train_list": train, "test_list": test, "val_list": val}.items():
        if text:
            (root / f"{name}.txt").write_text(text, encoding="utf-8")
        paths[name] = str(root / f"{name}.txt") if text else ""
    return DataConfig(source="list", path=str(root), image_size=size, **paths)  # type: ignore[arg-type]


def test_list_with_spaces_in_paths_and_a_validation_list(tmp_path: Path) -> None:
    for i, name in enumerate(["a/one two.png", "b.png", "c 1.png", "dé.png"]):
        write_image(tmp_path / name, i)
    train = "\ufeffa/one two.png 1\r\nb.png 0\n\nc 1.png\t2\ndé.png 0"
    packed = pack(list_config(tmp_path, train, "b.png 0\nb.png 1\nb.png 2\n", "b.png 2\nb.png 1\nb.png 0\n"), tmp_path)
    assert packed.train.labels.tolist() == [1, 0, 2, 0]
    assert pixels(packed.train)[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert packed.classes == ("0", "1", "2")
    assert packed.val.labels.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("a.png 0\nb.png\n", "a.png 0\n", r"train_list\.txt:2: a line must be 'relative/path label', not 'b\.png'"),
        ("a.png 0\n\nb.png -1\n", "a.png 0\n", r"train_list\.txt:3: the label is not an integer from 0 .* but '-1'"),
        ("a.png 0\nb.png 1.5\n", "a.png 0\n", r"train_list\.txt:2: .*'1\.5'"),
        ("a.png 1000000\n", "a.png 0\n", r"train_list\.txt:1: "),
        ("a.png 0\nb.png 2\n", "a.png 0\n", r"class 1 has no image in the train split"),
        ("a.png 0\nb.png 1\n", "a.png 0\na.png 1\nb.png 2\n", r"test_list\.txt:3: label 2 is not in 0\.\.1"),
        ("a.png 0\nb.png 1\n", "a.png 0\n", r"class 1 has no image in the test split"),
        ("a.png 0\n", "\n", r"test_list\.txt has no lines"),
    ],
)
def test_bad_lists_are_refused_by_file_and_line(tmp_path: Path, train: str, test: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        write_packed(list_config(tmp_path, train, test), tmp_path / "pack")
    assert "\n" not in str(error.value)


def test_missing_list_or_root_is_named(tmp_path: Path) -> None:
    config = list_config(tmp_path, "a.png 0", "a.png 0")
    with pytest.raises(UserError, match="nowhere does not exist"):
        write_packed(config.model_copy(update={"path": str(tmp_path / "nowhere")}), tmp_path / "pack")
    (tmp_path / "test_list.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read the list .*test_list\.txt: No such file"):
        pack(config, tmp_path / "pack")


def test_a_listed_file_that_does_not_decode_is_named_with_its_line(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0)
    (tmp_path / "b.png").write_text("no image")
    config = list_config(tmp_path, "a.png 0\n\na.png 0\na.png 1\nb.png 0\na.png 1\n", "a.png 0\na.png 1\n")
    drawn = config.model_copy(update={"profile": "counts", "counts": (3, 1)})  # other positions
    for one in (config, drawn):
        with pytest.raises(UserError, match=r"b\.png, train_list\.txt:5\) could not be read: not an image"):
            write_packed(one, tmp_path / "pack")


def test_a_list_of_imagenet_lt_size_opens_in_three_seconds(tmp_path: Path) -> None:
    labels = np.concatenate([np.arange(1000), np.random.default_rng(0).integers(0, 1000, 114846)])
    (tmp_path / "train.txt").write_text(
        "".join(f"train/n01440764/n01440764_{i}.JPEG {label}\n" for i, label in enumerate(labels))
    )
    start = time.perf_counter()
    source = open_source("list", tmp_path, train_list=tmp_path / "train.txt")
    assert np.array_equal(source.splits["train"].labels, labels) and len(source.classes) == 1000
    assert time.perf_counter() - start < 3


def test_real_imagenet_files_as_a_list(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "imagenet-sample-400.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    names = sorted(path.name for path in tmp_path.glob("*.JPEG"))
    lines = "".join(f"{name} {i % 4}\n" for i, name in enumerate(names))
    packed = pack(list_config(tmp_path, lines, lines, size=64), tmp_path)
    grey = []
    for i, name in enumerate(names):
        with Image.open(tmp_path / name) as image:
            if image.mode == "L":
                grey.append(i)
    assert len(names) == 400 and len(grey) == 8
    images = packed.train.take(np.array([*grey, 0, 1]))
    assert images.shape == (10, 64, 64, 3)
    assert np.ptp(images[:8], axis=-1).max() == 0 < np.ptp(images[8:], axis=-1).max()


# Arrays


@pytest.mark.parametrize(("size", "channels", "message"), [(32, 1, "digits images are 8x8"), (8, 3, "have 1 channel")])
def test_images_of_another_shape_than_configured_are_refused(
    tmp_path: Path, size: int, channels: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write_packed(DataConfig(source="digits", image_size=size, channels=channels), tmp_path / "pack")


@pytest.mark.parametrize(
    ("test_labels", "side", "message"),
    [
        ([0, 1, 2], 9, "idx images are 9x9, but data.image_size is 8"),
        ([0, 1, 3], 8, r"test split, image 2 of the source: label 3 is not in 0\.\.2"),
        ([0, 1, 1], 8, "class 2 has no image in the test split"),
        ([0, 1], 8, "3 images but 2 labels"),
    ],
)
def test_splits_that_do_not_fit_are_refused(tmp_path: Path, test_labels: list[int], side: int, message: str) -> None:
    (tmp_path / "idx").mkdir()
    for prefix, labels, size in (("train", [0, 1, 2], 8), ("t10k", test_labels, side)):
        for name, values in (("images-idx3", np.zeros((3, size, size))), ("labels-idx1", np.array(labels))):
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            (tmp_path / "idx" / f"{prefix}-{name}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())
    config = DataConfig(source="idx", path=str(tmp_path / "idx"), image_size=8, channels=1)
    with pytest.raises(UserError, match=message):
        pack(config, tmp_path / "pack")


def test_a_missing_fashion_mnist_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "FASHION_MNIST_PATH", str(tmp_path / "debian"))
    with pytest.raises(UserError, match="debian does not exist: apt-get install dataset-fashion-mnist"):
        write_packed(DataConfig(source="idx", image_size=28, channels=1), tmp_path / "pack")


# What is packed


def test_digits_are_packed_as_they_are_and_leave_no_trace_of_time_or_place(tmp_path: Path) -> None:
    config = DataConfig(
        source="digits", image_size=8, channels=1, profile="step", imbalance=5, n_max=50, val_per_class=4
    )
    packed = pack(config, tmp_path)
    splits = open_source("digits", "").splits
    for image_set, split in ((packed.train, "train"), (packed.val, "train"), (packed.test, "test")):
        np.testing.assert_array_equal(pixels(image_set), np.asarray(splits[split].samples)[image_set.index])
        np.testing.assert_array_equal(image_set.labels, splits[split].labels[image_set.index])
    assert packed.counts.tolist() == [50] * 5 + [10] * 5 and packed.counts.dtype == np.int64
    again = pack(config, tmp_path / "elsewhere")
    assert again.fingerprint == packed.fingerprint
    other = pack(config.model_copy(update={"seed": 1}), tmp_path / "other")
    assert other.fingerprint != packed.fingerprint
    assert source_differences(config, packed) == []
    without = pack(config.model_copy(update={"val_per_class": 0}), tmp_path)
    assert without.val is None and not (tmp_path / "pack" / "val.beton").exists()


@pytest.mark.parametrize("file", ["packed.json", "train.beton", "test.beton"])
@pytest.mark.parametrize("damage", ["gone", "cut", "another set's"])
def test_damage_is_one_line_that_says_what_to_run(tmp_path: Path, file: str, damage: str) -> None:
    config = DataConfig(source="digits", image_size=8, channels=1)
    pack(config, tmp_path / "run")
    path = tmp_path / "run" / "pack" / file
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 9)
    else:
        other = config.model_copy(update={"profile": "counts", "counts": (9,) * 10})
        write_packed(other, tmp_path / "other")
        shutil.copy(tmp_path / "other" / ("train.beton" if file == "test.beton" else file), path)
    with pytest.raises(UserError, match=r"run python -m diffult\.pack --run .*/run$") as error:
        read_packed(tmp_path / "run" / "pack")
    assert "\n" not in str(error.value)


def test_any_class_name_survives_and_changes_of_the_source_are_named(tmp_path: Path) -> None:
    root, odd = tmp_path / "source", os.fsdecode(b"caf\xe9 \xff")
    write_folder(root)
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / odd)
        (root / split / "bee").rename(root / split / "\u8702 \u00fc")
    config = folder_config(root)
    packed = pack(config, tmp_path)
    assert packed.classes == ("ant", *sorted([odd, "\u8702 \u00fc"]))
    assert source_differences(config, packed) == []
    write_image(root / "train" / "ant" / "more.png", 0)
    assert source_differences(config, packed) == ["train: 1 image more in class 'ant'"]
    shutil.rmtree(root / "test")
    assert "the split test is gone" in source_differences(config, packed)
    shutil.rmtree(root / "train" / "ant")
    (root / "train" / "ant").mkdir()
    assert "class ant has no image in" in source_differences(config, packed)[0]
    shutil.rmtree(root)
    assert source_differences(config, packed) == []
