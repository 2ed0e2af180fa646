"""Image files of every kind as they come in ImageNet: stored, cropped, seeded, and named when they are broken."""

from __future__ import annotations

import io
import logging
import re
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ffcv_reader import read_by_ffcv
from PIL import Image
from scipy.stats import ks_2samp

import ffcv_writers
from ffcv_writers import CenterCrop, Loader, Natural, RandomResizedCrop, SampleError, open_set, write
from ffcv_writers.decoding import centre_square, limit_shorter_side
from ffcv_writers.inspection import verify
from ffcv_writers.readers import open_source


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A photograph's stand-in: uint8 (H, W, 3) without much detail."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    """What ImageNet has, and then some; the names do not tell what is inside."""
    colour = Image.fromarray(smooth(90, 120))
    contents = {
        "colour.JPEG": encoded(colour, quality=90),
        "444.JPEG": encoded(colour, quality=95, subsampling=0),
        "progressive.JPEG": encoded(colour, progressive=True),
        "grey.JPEG": encoded(colour.convert("L")),
        "cmyk.JPEG": encoded(colour.convert("CMYK")),
        "rgb.JPEG": encoded(colour, keep_rgb=True),
        "turned.JPEG": encoded(colour, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        "a_png.JPEG": encoded(colour, "PNG"),
        "palette.JPEG": encoded(colour.quantize(16), "GIF"),
        "deep.JPEG": encoded(Image.fromarray(smooth(90, 120)[..., 0].astype(np.uint16) * 257), "PNG"),
        "see_through.JPEG": encoded(colour.convert("RGBA"), "PNG"),
        "tall.JPEG": encoded(Image.fromarray(smooth(301, 77, 1))),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


def expected(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    if image.mode.startswith("I"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def write_all(path: Path, contents: list[bytes], **options: object) -> list[Path]:
    names = np.arange(len(contents))
    return write(path, contents, labels=names % 3, synthetic=0 * names, index=names, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("storage", ["raw", "jpg"])
def test_every_kind_of_file_keeps_its_pixels(tmp_path: Path, storage: str) -> None:
    """Bit for bit: JPEGs are stored without loss. Only what is none, or is CMYK, is encoded anew as JPEG."""
    contents = files(tmp_path)
    write_all(tmp_path / "set.beton", list(contents.values()), storage=storage, workers=2)
    image_set = open_set([tmp_path / "set.beton"], mixed_sizes=True)
    anew = {"cmyk.JPEG", "a_png.JPEG", "palette.JPEG", "deep.JPEG", "see_through.JPEG"} if storage == "jpg" else set()
    for number, (name, content) in enumerate(contents.items()):
        pixels = image_set.image(number)
        assert pixels.shape == (*image_set.sizes[number], 3)
        difference = np.abs(pixels.astype(int) - expected(content)).mean()
        assert 0 < difference < 8 if name in anew else difference == 0, name
    assert (image_set.encoded == (storage == "jpg")).all()
    with pytest.raises(ValueError, match=r"sample 11 \(index 11\) is 301 x 77 pixels, .*90 x 120.*mixed_sizes"):
        open_set([tmp_path / "set.beton"])
    assert verify([tmp_path / "set.beton"]) == []


@pytest.mark.parametrize("storage", ["raw", "jpg"])
def test_larger_images_are_shrunk_and_others_stored_without_loss(tmp_path: Path, storage: str) -> None:
    contents, shrink = list(files(tmp_path).values()), partial(limit_shorter_side, size=80)
    write_all(tmp_path / "set.beton", contents, storage=storage, transform=shrink)
    image_set = open_set([tmp_path / "set.beton"], mixed_sizes=True)
    assert image_set.sizes[0].tolist() == [80, 106]
    torchvision = pytest.importorskip("torchvision.transforms.functional")
    wanted = torchvision.resize(Image.open(io.BytesIO(contents[0])), 80, torchvision.InterpolationMode.BICUBIC)
    assert np.abs(image_set.image(0).astype(int) - np.asarray(wanted)).max() <= (0 if storage == "raw" else 12)
    np.testing.assert_array_equal(image_set.image(11), expected(contents[11]))  # 301 x 77: its own coefficients


@pytest.mark.parametrize(("height", "width"), [(100, 75), (75, 100), (101, 76), (40, 333), (20, 31), (32, 45)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_centre_square_is_torchvisions_to_the_bit(height: int, width: int, channels: int) -> None:
    picture = smooth(height, width)[..., :channels]
    image = Image.fromarray(picture.squeeze())
    torchvision = pytest.importorskip("torchvision.transforms.functional")
    resized = torchvision.resize(image, [32], torchvision.InterpolationMode.BICUBIC)
    theirs = np.asarray(torchvision.center_crop(resized, [32]))
    np.testing.assert_array_equal(centre_square(picture, 32), theirs.reshape(32, 32, channels))


@pytest.mark.parametrize("storage", ["raw", "jpg"])
def test_crops_are_those_of_torchvision(tmp_path: Path, storage: str) -> None:
    torchvision = pytest.importorskip("torchvision.transforms.functional")
    contents = list(files(tmp_path).values())
    write_all(tmp_path / "set.beton", contents, storage=storage)
    image_set = open_set([tmp_path / "set.beton"], mixed_sizes=True)
    middle = CenterCrop(64, 64 / 72)
    batch, streamed = (
        next(Loader(image_set, 12, crop=middle, resident=resident).sequential()) for resident in (True, False)
    )
    assert torch.equal(batch.images, streamed.images)
    for number in range(len(contents)):
        image = Image.fromarray(image_set.image(number))
        scaled = torchvision.resize(image, 72, torchvision.InterpolationMode.BILINEAR)
        theirs = torchvision.center_crop(scaled, [64, 64])
        difference = batch.images[number].numpy().astype(int) - np.asarray(theirs)  # the crop is first here, last there
        assert np.abs(difference).mean() < (3 if number == 11 else 1)  # 77 pixels scale to 68.4
    random = RandomResizedCrop(48, seed=3)
    order, positions = np.arange(12).repeat(3), np.arange(100, 136)
    boxes = random.boxes(image_set.sizes[order], positions)
    batch = next(Loader(image_set, 36, crop=random, num_workers=3).batches(order, positions))
    for number, (top, left, height, width) in enumerate(boxes.tolist()):
        image = Image.fromarray(image_set.image(order[number]))
        theirs = np.asarray(torchvision.resized_crop(image, top, left, height, width, [48, 48]))
        assert np.abs(batch.images[number].numpy().astype(int) - theirs).max() <= 2


@pytest.mark.parametrize("size", [(375, 500), (40, 400), (500, 90)])
def test_random_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    """Kolmogorov-Smirnov on place, area and shape; the last two sizes are too narrow for most attempts."""
    torchvision = pytest.importorskip("torchvision.transforms").RandomResizedCrop
    torch.manual_seed(0)
    count = 2000
    theirs = np.array([
        torchvision.get_params(torch.empty(3, *size), [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)
    ])  # fmt: skip
    crop = RandomResizedCrop(32, seed=1)
    ours = crop.boxes(np.tile(size, (count, 1)), np.arange(count))
    assert (ours >= 0).all() and (ours[:, 2:] > 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    for one, other in zip(ours.T, theirs.T, strict=True):
        assert ks_2samp(one, other).pvalue > 1e-4
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-4
    assert ks_2samp(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]).pvalue > 1e-4
    again = crop.boxes(np.tile(size, (3, 1)), np.array([7, 3, 7]))
    np.testing.assert_array_equal(again, ours[[7, 3, 7]])  # a function of the position alone
    other = RandomResizedCrop(32, seed=2).boxes(np.tile(size, (count, 1)), np.arange(count))
    assert (other != ours).any(1).mean() > 0.9 or size != (375, 500)


def test_the_same_stream_whatever_threads_ranks_and_restarts(tmp_path: Path) -> None:
    write_all(tmp_path / "set.beton", list(files(tmp_path).values()), storage="jpg")
    image_set, crop = open_set([tmp_path / "set.beton"], mixed_sizes=True), RandomResizedCrop(32, seed=9)
    order = Natural(12)

    def stream(batch_size: int, start: int, stop: int, workers: int, rank: int = 0, world: int = 1) -> torch.Tensor:
        loader = Loader(image_set, batch_size, crop=crop, num_workers=workers)
        (draws,) = order.steps(4, batch_size, start, stop, rank=rank, world=world)
        return torch.cat([batch.images for batch in loader.batches(*draws)])

    whole = stream(8, 0, 6, 1)
    assert torch.equal(whole, stream(8, 0, 6, 3))
    assert torch.equal(whole[24:], stream(8, 3, 6, 2))  # resumed in the middle of an epoch
    assert torch.equal(whole, stream(4, 0, 12, 2))
    ranks = [stream(2, 0, 6, 1, rank, 4).view(6, 2, 32, 32, 3) for rank in range(4)]
    assert torch.equal(whole, torch.stack(ranks, 1).flatten(0, 2))


@pytest.mark.parametrize("storage", ["raw", "jpg"])
def test_ffcv_itself_decodes_these_files(tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw, some are larger than the pages that the file begins with."""
    pytest.importorskip("ffcv")
    monkeypatch.setattr("ffcv_writers.writing._MIXED_PAGE", 1 << 15)
    write_all(tmp_path / "set.beton", list(files(tmp_path).values()), storage=storage)
    theirs, labels, _, index = read_by_ffcv(tmp_path / "set.beton", 12, crop=64)
    image_set = open_set([tmp_path / "set.beton"], mixed_sizes=True)
    ours = next(Loader(image_set, 12, crop=CenterCrop(64, 1.0)).sequential())
    np.testing.assert_array_equal(labels.ravel(), ours.labels.numpy())
    np.testing.assert_array_equal(index.ravel(), np.arange(12))
    assert np.abs(theirs.astype(int) - ours.images.numpy()).mean() < 2  # it scales otherwise


def test_this_reads_what_ffcv_writes(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    rows = [(smooth(40 + n, 50, n), n % 3, 0, n) for n in range(9)]
    fields = {"image": RGBImageField("raw"), "label": IntField(), "synthetic": IntField(), "index": IntField()}
    DatasetWriter(str(tmp_path / "set.beton"), fields, num_workers=2).from_indexed_dataset(rows, chunksize=2)
    image_set = open_set([tmp_path / "set.beton"], mixed_sizes=True)
    for number, (image, label, _, _) in enumerate(rows):
        np.testing.assert_array_equal(image_set.image(number), image)
        assert image_set.labels[number] == label


@pytest.mark.timeout(200)
@pytest.mark.parametrize("storage", ["raw", "jpg"])
@pytest.mark.parametrize("damage", ["truncated", "no image", "a hole", "gone"])
def test_a_broken_file_is_named_and_nothing_is_written(tmp_path: Path, storage: str, damage: str) -> None:
    folder = tmp_path / "images" / "dog"
    folder.mkdir(parents=True)
    files(folder)
    broken, threads = folder / "grey.JPEG", set(threading.enumerate())
    content = broken.read_bytes()
    source = open_source("folder", tmp_path / "images").splits["train"]
    if damage == "gone":
        broken.unlink()
    else:
        hole = content[:40] + bytes(200) + content[240:]
        broken.write_bytes({"truncated": content[: len(content) // 2], "no image": b"<html>", "a hole": hole}[damage])
    columns = {"labels": source.labels, "synthetic": 0 * source.labels, "index": np.arange(len(source.labels))}
    with pytest.raises(ValueError, match=rf"set\.beton: sample \d+ \(.*{broken.name}\) could not be read"):
        write(tmp_path / "set.beton", source.samples, **columns, storage=storage, workers=3)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("set*")) and set(threading.enumerate()) == threads


@pytest.mark.parametrize("storage", ["raw", "jpg"])
def test_a_defect_that_decoders_tolerate_is_logged(
    tmp_path: Path, storage: str, caplog: pytest.LogCaptureFixture
) -> None:
    contents = [encoded(Image.fromarray(smooth(64, 64, n)), quality=95) for n in range(3)]
    contents[1] = contents[1][:-2] + b"some more" + contents[1][-2:]  # before the end marker
    write_all(tmp_path / "set.beton", contents, storage=storage)
    (record,) = caplog.records
    assert re.search(r"set\.beton: sample 1 has a defect: .* extraneous bytes", record.getMessage())
    image_set = open_set([tmp_path / "set.beton"])
    assert np.abs(image_set.image(1).astype(int) - expected(contents[1])).mean() < (1 if storage == "raw" else 8)
    assert verify([tmp_path / "set.beton"]) == []


@pytest.mark.timeout(200)
@pytest.mark.parametrize("workers", [1, 3])
def test_an_image_that_breaks_after_it_was_written_is_named(tmp_path: Path, workers: int) -> None:
    contents = [encoded(Image.fromarray(smooth(64, 64, n)), quality=95) for n in range(64)]
    write_all(tmp_path / "set.beton", contents, storage="jpg")
    image_set, before = open_set([tmp_path / "set.beton"]), set(threading.enumerate())
    stored = image_set.stored(37)
    content = bytearray((tmp_path / "set.beton").read_bytes())
    at = content.find(stored.data.tobytes())
    content[at + len(stored.data) - 300 : at + len(stored.data)] = bytes(300)  # the entropy-coded end
    (tmp_path / "set.beton").write_bytes(content)
    image_set = open_set([tmp_path / "set.beton"])
    with pytest.raises(SampleError, match=r"set\.beton: sample 37 \(index 37\) does not decode"):
        for _ in Loader(image_set, 8, num_workers=workers, crop=CenterCrop(32), resident=False).sequential():
            pass
    with pytest.raises(SampleError, match="sample 37 "):  # the set that stays on the device, too
        next(Loader(image_set, 8, num_workers=workers).sequential())
    assert set(threading.enumerate()) == before
    assert len(verify([tmp_path / "set.beton"])) == 1 and "sample 37 " in verify([tmp_path / "set.beton"])[0]


@pytest.mark.timeout(200)
def test_an_operation_that_raises_names_its_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [encoded(Image.fromarray(smooth(64, 64, n))) for n in range(64)]
    write_all(tmp_path / "set.beton", contents, storage="jpg")
    loader = Loader(open_set([tmp_path / "set.beton"]), 8, num_workers=2, crop=RandomResizedCrop(32, seed=0))
    before, calls = set(threading.enumerate()), iter(range(10**6))
    crop = ffcv_writers.image_set.resized_crop

    def broken(*arguments: object) -> np.ndarray:
        if next(calls) == 29:
            raise ArithmeticError("a cosmic ray")
        return crop(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("ffcv_writers.image_set.resized_crop", broken)
    batches = loader.sequential()
    with pytest.raises(SampleError, match=r"set\.beton: sample \d+ \(index \d+\) cannot be read: .*a cosmic ray"):
        for _ in batches:
            pass
    assert set(threading.enumerate()) == before


def test_the_choice_of_loader_is_automatic_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [encoded(Image.fromarray(smooth(64, 64, n))) for n in range(20)]
    write_all(tmp_path / "set.beton", contents, storage="jpg")
    image_set, order = open_set([tmp_path / "set.beton"]), np.array([3, 19, 3, 0, 7])
    batches = {}
    with caplog.at_level(logging.DEBUG, "ffcv_writers"):
        for room in (4 * 20 * 64 * 64 * 3, 4 * 20 * 64 * 64 * 3 - 4):
            monkeypatch.setattr("ffcv_writers.loader.free_memory", lambda device, room=room: room)
            loader = Loader(image_set, 3, num_workers=2)
            batches[loader.resident] = [list(loader.batches(order, order + 5)) for _ in range(2)][1]
        Loader(image_set, 3, crop=RandomResizedCrop(32, seed=0))
        Loader(image_set, 3, resident=True)
        monkeypatch.setattr("ffcv_writers.loader.free_memory", lambda device: 4 * 20 * 32 * 32 * 3)
        assert Loader(image_set, 3, crop=CenterCrop(32)).resident
        write_all(tmp_path / "raw.beton", contents)
        Loader(open_set([tmp_path / "raw.beton"]), 3)
    kept, streamed, cropped, asked, _, raw = (record.getMessage() for record in caplog.records)
    assert "set.beton: 20 images, 0.2 MB, kept on cpu" in kept and "as asked for" in asked
    assert "decoded ahead by 2 threads (for 0 MB of cpu memory)" in streamed and "(cropped at random)" in cropped
    assert "raw.beton: 20 images, 0.2 MB, gathered from the page cache" in raw
    assert [record.levelno for record in caplog.records] == [logging.INFO] * 5 + [logging.DEBUG]
    for one, other in zip(batches[True], batches[False], strict=True):
        for name in ("images", "labels", "synthetic", "index", "sample", "position"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    with pytest.raises(ValueError, match="cannot stay on the device"):
        Loader(image_set, 3, crop=RandomResizedCrop(32, seed=0), resident=True)


@pytest.mark.timeout(200)
def test_real_imagenet_files(shared_data: Path, tmp_path: Path) -> None:
    """400 files of ImageNet by list: stored without loss, with 2 % more bytes for restarts; Pillow's pixels; crops."""
    archive = shared_data / "imagenet-sample-400.tar"
    with tarfile.open(archive) as members:
        members.extractall(tmp_path / "images", filter="data")
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    (tmp_path / "list.txt").write_text("".join(f"{name} {label}\n" for label, name in enumerate(names)))
    source = open_source("list", tmp_path / "images", train_list=tmp_path / "list.txt").splits["train"]
    columns = {"labels": source.labels, "synthetic": 0 * source.labels, "index": np.arange(len(source.labels))}
    write(tmp_path / "set.beton", source.samples, **columns, storage="jpg", workers=2)
    image_set = open_set([tmp_path / "set.beton"], mixed_sizes=True)
    assert len(image_set) == 400 and np.ptp(image_set.sizes) > 300
    total = sum((tmp_path / "images" / name).stat().st_size for name in names)
    assert 1 < (tmp_path / "set.beton").stat().st_size / total < 1.025
    for number in range(0, 400, 5):
        content = (tmp_path / "images" / names[number]).read_bytes()
        np.testing.assert_array_equal(image_set.image(number), expected(content))
    seen = []
    for batch in Loader(image_set, 64, crop=RandomResizedCrop(96, seed=0)).batches(Natural(400).epoch(0, 0)):
        assert batch.images.shape[1:] == (96, 96, 3) and batch.images.float().std((1, 2, 3)).min() > 1
        seen += batch.labels.tolist()
    assert sorted(seen) == list(range(400))


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [False, True])
def test_a_busy_gpu_gets_the_same_batches_and_may_keep_them(tmp_path: Path, resident: bool) -> None:
    """Every batch is used by work queued behind a long product, and kept: no copy may overtake or overwrite it."""
    contents = [encoded(Image.fromarray(smooth(224, 224, n))) for n in range(200)]
    write_all(tmp_path / "set.beton", contents, storage="jpg")
    image_set, order = open_set([tmp_path / "set.beton"]), Natural(200).stream(0, 0, 600)
    busy, kept, copies = torch.randn(4096, 4096, device="cuda"), [], []
    for batch in Loader(image_set, 20, device="cuda", resident=resident).batches(order):
        busy = busy @ busy / 64
        kept.append(batch.images)
        copies.append(batch.images + 0)
    for batch, image, copy in zip(Loader(image_set, 20).batches(order), kept, copies, strict=True):
        assert image.device.type == "cuda"
        assert torch.equal(image.cpu(), batch.images) and torch.equal(copy.cpu(), batch.images)
