"""Image sets, long-tail profiles, the drawn subset and the splits."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from diffult.data import ArrayImages, DataConfig, FileImages, ImageSet, load_data
from diffult.data.image_set import Source
from diffult.data.profiles import class_counts, draw, exponential, step
from diffult.errors import UserError


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth colour picture, uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def file_set(*paths: Path, size: int = 32) -> FileImages:
    return FileImages([str(path) for path in paths], np.zeros(len(paths)), ("only",), size)


def array_set(counts: list[int], seed: int = 0) -> ArrayImages:
    """Grey 2x2 images, each with its own number in its pixels, labels mixed."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    numbers = np.arange(len(labels), dtype=">u4").view(np.uint8).reshape(-1, 2, 2, 1)
    return ArrayImages(numbers, labels, tuple(f"c{i}" for i in range(len(counts))))


def numbers_of(images: ImageSet | None) -> list[int]:
    """The numbers that array_set wrote."""
    assert images is not None
    return images.load().reshape(-1, 4).copy().view(">u4")[:, 0].tolist()


# Image sets


def test_array_images_are_read_loaded_counted_and_subset() -> None:
    images = array_set([3, 0, 5])
    assert len(images) == 8
    assert images.labels.dtype == np.int64
    assert images.shape == (2, 2, 1)
    assert images.counts().tolist() == [3, 0, 5]
    part = images.subset(np.array([6, 1, 6]))
    assert numbers_of(part) == [6, 1, 6]
    assert part.labels.tolist() == images.labels[[6, 1, 6]].tolist()
    assert part.classes == images.classes
    assert np.array_equal(part.read(1), images.read(1))
    part.check()


def test_files_of_the_right_size_pass_untouched(tmp_path: Path) -> None:
    pixels = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in range(5)]
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    images = file_set(*paths)
    assert np.array_equal(images.load(), np.stack(pixels))
    assert np.array_equal(images.subset(np.array([3, 0])).load(), np.stack([pixels[3], pixels[0]]))
    assert images.read(2).flags.writeable  # torch.from_numpy warns otherwise


@pytest.mark.parametrize(("height", "width"), [(100, 75), (75, 100), (101, 76), (40, 333), (20, 31), (32, 45)])
def test_resize_and_crop_equal_torchvision(tmp_path: Path, height: int, width: int) -> None:
    image = Image.fromarray(picture(height, width))
    image.save(tmp_path / "a.png")
    expected = F.center_crop(F.resize(image, [32], InterpolationMode.BICUBIC), [32])
    assert np.array_equal(file_set(tmp_path / "a.png").read(0), np.array(expected))


def test_every_colour_mode_becomes_rgb(tmp_path: Path) -> None:
    colour = Image.fromarray(picture(48, 40))
    grey = colour.convert("L")
    colour.save(tmp_path / "rgb.png")
    colour.convert("RGBA").save(tmp_path / "rgba.png")
    colour.save(tmp_path / "png-in-truth.jpg", format="PNG")
    grey.save(tmp_path / "grey.png")
    grey.convert("LA").save(tmp_path / "grey-alpha.png")
    deep = Image.fromarray(np.array(grey).astype(np.uint16) * 257)
    deep.save(tmp_path / "grey16.png")
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    colour.quantize(64).save(tmp_path / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees": left alone, as training on files does
    colour.save(tmp_path / "turned.png", exif=exif)

    def read(name: str) -> np.ndarray:
        return file_set(tmp_path / name).read(0).astype(int)

    rgb, l8 = read("rgb.png"), read("grey.png")
    assert np.ptp(l8, axis=-1).max() == 0
    for name in ("rgba.png", "png-in-truth.jpg", "turned.png"):
        assert np.array_equal(read(name), rgb)
    for name in ("grey-alpha.png", "grey16.png"):
        assert np.array_equal(read(name), l8)
    assert np.abs(read("cmyk.jpg") - rgb).mean() < 6  # inverted, as Adobe stores it, would be about 100
    assert np.abs(read("palette.png") - rgb).mean() < 12


def test_check_names_the_first_file_that_does_not_decode(tmp_path: Path) -> None:
    for i in range(40):
        Image.fromarray(picture(64, 64, i)).save(tmp_path / f"{i:02d}.jpg", quality=90)
    paths = sorted(tmp_path.iterdir())
    images = file_set(*paths)
    images.check()
    for i in (17, 31):  # a truncated file has a whole header: only decoding finds it
        paths[i].write_bytes(paths[i].read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cannot decode .*17\.jpg: .*truncated"):
        images.check()
    with pytest.raises(UserError, match=r"cannot decode .*17\.jpg"):
        images.load()
    paths[5].write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"05\.jpg: not an image in a known format") as error:
        images.check()
    assert "\n" not in str(error.value)
    paths[2].unlink()
    with pytest.raises(UserError, match=r"02\.jpg: No such file"):
        images.check()


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="floating-point"):
        file_set(tmp_path / "a.tiff").check()


# Profiles


@pytest.mark.parametrize(
    ("classes", "imbalance", "total"),
    [
        (10, 100, 12406),
        (10, 50, 13996),
        (10, 10, 20431),
        (100, 100, 10847),
        (100, 50, 12608),
        (100, 10, 19573),
    ],
)
def test_cifar_lt_sizes_are_the_published_ones(classes: int, imbalance: float, total: int) -> None:
    counts = exponential(50000 // classes, imbalance, classes)
    assert sum(counts) == total
    # as imbalance_cifar.py writes it, with the reciprocal factor
    assert counts == [int(50000 / classes * ((1 / imbalance) ** (i / (classes - 1.0)))) for i in range(classes)]


def test_imbalance_factor_is_exact_at_the_last_class() -> None:
    for imbalance in range(1, 300):
        for n_min in (1, 3, 20):
            assert exponential(n_min * imbalance, imbalance, 10)[-1] == n_min


def test_step_profile() -> None:
    assert step(500, 10, 6) == [500, 500, 500, 50, 50, 50]
    assert step(500, 10, 5) == [500, 500, 500, 50, 50]


def test_class_counts_take_the_largest_class_unless_told() -> None:
    available = np.array([90, 120, 100])
    config = DataConfig(source="digits", profile="exponential", imbalance=4)
    assert class_counts(config, available) == [120, 60, 30]
    assert class_counts(config.model_copy(update={"n_max": 80}), available) == [80, 40, 20]
    assert class_counts(DataConfig(source="digits", profile="natural"), available) == [90, 120, 100]
    given = DataConfig(source="digits", profile="counts", counts=(5, 2, 7))
    assert class_counts(given, available) == [5, 2, 7]
    with pytest.raises(UserError, match="3 numbers for 4 classes"):
        class_counts(given, np.array([9, 9, 9, 9]))


def published_cifar_lt(labels: list[int], cls_num: int, imb_factor: float, rand_number: int) -> np.ndarray:
    """LDAM-DRW's gen_imbalanced_data written anew: numpy's global generator, classes by np.unique."""
    state = np.random.get_state()
    np.random.seed(rand_number)
    targets = np.array(labels, dtype=np.int64)
    selected: list[int] = []
    for rank, which in enumerate(np.unique(targets)):
        number = int((len(targets) / cls_num) * imb_factor ** (rank / (cls_num - 1.0)))
        index = np.where(targets == which)[0]
        np.random.shuffle(index)
        selected += list(index[:number])
    np.random.set_state(state)
    return np.array(selected)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("imbalance", [100, 50, 10])
def test_drawn_indices_are_those_of_the_published_procedure(classes: int, imbalance: int) -> None:
    labels = np.random.default_rng(7).permutation(np.arange(50000) % classes)
    for seed in (0, 3):
        drawn = draw(labels, exponential(50000 // classes, imbalance, classes), seed)
        assert np.array_equal(drawn, published_cifar_lt(labels.tolist(), classes, 1 / imbalance, seed))


def test_drawn_indices_are_pinned() -> None:
    """Held as numbers too: CIFAR-LT must not move with a new numpy."""
    drawn = draw(np.arange(50000) % 10, exponential(5000, 100, 10), seed=0)
    assert drawn[:5].tolist() == [3980, 38330, 48360, 45720, 6360]
    assert drawn[-3:].tolist() == [15789, 4339, 11629]
    assert (
        hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest()
        == "563055e23a86ca16a1817853b5083e2cc07118f9307ecc8082d4fcdc922f6f6b"
    )


def test_a_count_that_the_set_cannot_give_is_refused() -> None:
    labels = np.repeat([0, 1, 2], [10, 4, 10])
    with pytest.raises(UserError, match="class 1 should get 5 training images but the source has 4"):
        draw(labels, [10, 5, 1], seed=0)
    with pytest.raises(UserError, match="class 2 would get 0 images"):
        draw(labels, [10, 4, 0], seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "digits", "profile": "exponential"}, "needs imbalance"),
        ({"source": "digits", "profile": "step"}, "needs imbalance"),
        ({"source": "digits", "profile": "counts"}, "needs counts"),
        ({"source": "cifar10"}, "needs path"),
        ({"source": "list", "path": "x", "train_list": "a"}, "needs train_list and test_list"),
        ({"source": "digits", "imbalance": 0.01}, "greater than or equal to 1"),
        ({"source": "digits", "imbalance": float("inf")}, "finite"),
        ({"source": "digits", "channels": 2}, "1 or 3"),
        ({"source": "digits", "seed": -1}, "greater than or equal to 0"),
        ({"source": "digits", "horizontal_flip": True}, "not permitted"),
    ],
)
def test_config_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)  # type: ignore[arg-type]


# Splits


def source_of(monkeypatch: pytest.MonkeyPatch, train: list[int], val: list[int] | None = None) -> Source:
    """Puts a source with these class sizes in place of the configured one."""
    source = Source(array_set(train), array_set([2] * len(train), 1), None if val is None else array_set(val, 2))
    monkeypatch.setattr("diffult.data.splits.load_source", lambda config: source)
    return source


def test_drawn_splits_are_disjoint_and_test_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(monkeypatch, [60, 60, 60])
    config = DataConfig(source="digits", profile="exponential", imbalance=9, n_max=45, val_per_class=20, seed=4)
    data = load_data(config)
    train, val = numbers_of(data.train), numbers_of(data.val)
    assert data.train.counts().tolist() == [45, 15, 5]
    assert data.val is not None and data.val.counts().tolist() == [15, 20, 20]  # class 0 has but 15 left
    assert len(set(train) | set(val)) == len(train) + len(val)
    assert data.test is source.test
    assert train == draw(source.train.labels, [45, 15, 5], seed=4).tolist()  # the published order, val or not
    again = load_data(config)
    assert (numbers_of(again.train), numbers_of(again.val)) == (train, val)
    other = load_data(config.model_copy(update={"seed": 5}))
    assert set(numbers_of(other.train)) != set(train) and set(numbers_of(other.val)) != set(val)


def test_no_remainder_means_no_validation_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source_of(monkeypatch, [10, 10, 10])
    with caplog.at_level(logging.WARNING):
        data = load_data(DataConfig(source="digits", profile="counts", counts=(10, 4, 10), val_per_class=3))
    assert data.val is not None and data.val.counts().tolist() == [0, 3, 0]
    assert "no image is left to validate 2 of 3 classes: c0, c2" in caplog.text
    assert load_data(DataConfig(source="digits", profile="counts", counts=(10, 10, 10), val_per_class=3)).val is None
    assert load_data(DataConfig(source="digits", profile="counts", counts=(5, 5, 5))).val is None


def test_natural_profile_holds_out_a_tenth_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(monkeypatch, [100, 35, 9])
    data = load_data(DataConfig(source="digits", profile="natural", val_per_class=5))
    assert data.val is not None and data.val.counts().tolist() == [5, 3, 0]
    assert data.train.counts().tolist() == [95, 32, 9]
    assert sorted(numbers_of(data.train) + numbers_of(data.val)) == list(range(144))
    assert data.test is source.test
    assert numbers_of(load_data(DataConfig(source="digits")).train) == list(range(144))


def test_a_validation_split_of_the_source_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(monkeypatch, [20, 20], val=[4, 4])
    data = load_data(DataConfig(source="digits", profile="natural", val_per_class=1))
    assert data.val is source.val
    assert len(data.train) == 40
