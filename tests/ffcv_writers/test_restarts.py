"""Restarts in JPEG files and the parts that they make: against Pillow, which decodes the whole."""

import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("ffcv")

from ffcv_writers import RandomResizedCrop, open_set, write
from ffcv_writers.jpeg.part import layout, part
from ffcv_writers.jpeg.restarts import with_restarts
from ffcv_writers.jpeg.turbojpeg import decode_jpeg

KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "own tables": {"optimize": True, "subsampling": 2},
    "restarts already": {"restart_marker_blocks": 7, "subsampling": 2},
    "rgb": {"keep_rgb": True},
    "grey": {},
    "of a camera": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0", "quality": 98, "dpi": (300, 300)},
}


def jpeg(height: int, width: int, kind: str, seed: int = 0, **options: object) -> np.ndarray:
    """A file of smooth colours with edges and some noise."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + c) + seed) + np.cos(y / (9 - c)) + 2 * ((x // 37 + y // 23) % 2) for c in range(3)]
    noise = np.random.default_rng(seed).normal(0, 6, (height, width, 3))
    image = Image.fromarray((40 * (np.stack(waves, 2) + 2) + noise).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    (image.convert("L") if kind == "grey" else image).save(buffer, "JPEG", **(KINDS[kind] | options))
    return np.frombuffer(buffer.getvalue(), np.uint8)


def pixels(content: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content.tobytes())).convert("RGB"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(150, 200), (133, 259), (700, 47), (129, 128)])
def test_restarts_change_no_pixel(kind: str, size: tuple[int, int]) -> None:
    content = jpeg(*size, kind)
    cut = with_restarts(content)
    found = layout(cut)
    assert found is not None and found.interval and found.columns % found.interval == 0
    np.testing.assert_array_equal(pixels(cut), pixels(content))
    assert len(cut) < 1.1 * len(content) + 200
    before, after = (Image.open(io.BytesIO(file.tobytes())) for file in (content, cut))
    assert after.info == before.info and after.quantization == before.quantization


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*KINDS]), st.integers(129, 300), st.integers(129, 300), st.integers(0, 99), st.data())
def test_a_part_has_the_pixels_of_the_whole(kind: str, height: int, width: int, seed: int, data: st.DataObject) -> None:
    cut = with_restarts(jpeg(height, width, kind, seed))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = [top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))]
    found = part(cut, (height, width), np.array(box))
    if found is None:
        assert box[2] > 0.9 * height - 40  # nine tenths of the rows, but for those that are there as neighbours
        return
    file, (y, x, h, w) = found
    assert [h, w] == box[2:] and len(file) < len(cut)
    np.testing.assert_array_equal(pixels(file)[y : y + h, x : x + w], pixels(cut)[top:, left:][:h, :w])


def test_a_part_is_as_small_as_the_restarts_allow() -> None:
    """64 x 64 pixels out of 512 x 512, a restart every 64 columns."""
    cut = with_restarts(jpeg(512, 512, "4:2:0"))
    for corner in (0, 64, 100, 448):
        found = part(cut, (512, 512), np.array([corner, corner, 64, 64]))
        assert found is not None
        assert max(pixels(found[0]).shape[:2]) <= 64 + 2 * 64 and len(found[0]) < len(cut) / 8


@pytest.mark.parametrize("kind", ["progressive", "small", "no image", "CMYK", "more behind the image"])
def test_what_cannot_be_cut_stays_as_it_is(kind: str) -> None:
    if kind == "CMYK":
        buffer = io.BytesIO()
        Image.new("CMYK", (200, 200)).save(buffer, "JPEG")
        content = np.frombuffer(buffer.getvalue(), np.uint8)
    elif kind == "more behind the image":
        content = np.tile(jpeg(200, 200, "4:2:0"), 2)
    elif kind == "no image":
        content = np.arange(20000).astype(np.uint8)
    else:
        content = jpeg(200, 200, "grey", progressive=True) if kind == "progressive" else jpeg(128, 128, "4:2:0")
    assert with_restarts(content) is content
    assert part(content, (200, 200), np.array([0, 0, 9, 9])) is None


def test_damage_is_left_to_the_decoder() -> None:
    """Bytes changed, cut off or added anywhere: no crash, and never other pixels than those of the damaged file."""
    whole, draw, cut = jpeg(150, 200, "4:2:0", 3), random.Random(0), 0
    for attempt in range(300):
        broken = whole.copy()
        if attempt % 3 == 0:
            broken = broken[: draw.randrange(2, len(whole))]
        elif attempt % 3 == 1:
            broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        else:
            broken[draw.randrange(len(whole)) :][:9] = draw.choice([0, 0xFF, 0xD9, 0x55])
        recoded = with_restarts(broken)
        if recoded is broken:
            continue
        cut += 1
        try:
            expected = pixels(broken)
        except (OSError, SyntaxError, ValueError):
            continue  # what its header says of the image is damaged too
        np.testing.assert_array_equal(pixels(recoded), expected)
        part(recoded, (150, 200), np.array([10, 10, 20, 20]))
    assert 10 < cut < 290


def test_segments_of_others_are_kept_and_our_own_made_anew() -> None:
    foreign = b"\xff\xea\x00\x06else" + b"\xff\xea\x00\x0eSEGMENTS\x00123"
    content = jpeg(200, 200, "4:4:4")
    content = np.frombuffer(content[:2].tobytes() + foreign + content[2:].tobytes(), np.uint8)
    box = np.array([50, 50, 60, 60])
    assert part(content, (200, 200), box) is None
    cut = with_restarts(content)
    again = with_restarts(cut)
    for file in (cut, again):
        assert file.tobytes().count(b"else") == file.tobytes().count(b"SEGMENTS\0") == 1
        found = part(file, (200, 200), box)
        assert found is not None
        (y, x, h, w), image = found[1], pixels(found[0])
        np.testing.assert_array_equal(image[y : y + h, x : x + w], pixels(content)[50:110, 50:110])
    np.testing.assert_array_equal(again, cut)


def test_parts_of_damaged_files_are_none() -> None:
    cut, box = with_restarts(jpeg(200, 200, "4:4:4")), np.array([50, 50, 60, 60])
    assert part(cut, (200, 200), box) is not None
    assert part(cut, (200, 201), box) is None
    assert part(cut[:-300], (200, 200), box) is None
    assert part(np.delete(cut, 5000), (200, 200), box) is None
    assert part(jpeg(200, 200, "restarts already"), (200, 200), box) is None  # it does not tell where they are
    for end in range(1000):
        part(cut[:end], (200, 200), box)


def test_components_of_one_name_are_left_alone() -> None:
    """Which of two tables is a component's own is then unclear."""
    content = jpeg(200, 200, "4:4:4").copy()
    for first in (b"\xff\xc0\x00\x11\x08", b"\xff\xda\x00\x0c"):
        at = content.tobytes().index(first)
        step, at = (3, at + 10) if first[1] == 0xC0 else (2, at + 5)
        assert content[at : at + 3 * step : step].tolist() == [1, 2, 3]
        content[at : at + 3 * step : step] = 1
    assert with_restarts(content) is content


def test_without_a_folder_for_compiled_code_it_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from ffcv_writers.jpeg import restarts

    def njit(**options: bool) -> object:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, options)

    monkeypatch.setattr(restarts.numba, "njit", njit)
    assert restarts._compiled(len) == (len, {"nogil": True})


@pytest.mark.parametrize("damage", ["cut in a table", "another frame", "end where the scan begins"])
def test_a_damaged_header_is_that_file_s_alone(damage: str) -> None:
    """TurboJPEG's decompressor keeps what it read of a header that failed, and may take the next file for that."""
    good, bad = jpeg(150, 200, "4:2:0"), jpeg(160, 170, "4:4:4").copy()
    scan = bad.tobytes().index(b"\xff\xda")
    if damage == "cut in a table":
        bad = bad[: scan - 100]
    elif damage == "another frame":
        bad[bad.tobytes().index(b"\xff\xc0") + 1] = 0xC3
    else:
        bad[scan + 1] = 0xD9
    for _ in range(3):
        with pytest.raises(ValueError):
            decode_jpeg(bad)
        np.testing.assert_array_equal(decode_jpeg(good), pixels(good))


def test_a_loader_decodes_parts_and_shows_the_same(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Crops of files as `write` stores them, and with whole images decoded; a part is less to decode."""
    from ffcv_writers import image_set as module

    contents = [jpeg(300 + 7 * n, 400 - 9 * n, kind, n).tobytes() for n, kind in enumerate(KINDS)]
    names = np.arange(len(contents))
    write(tmp_path / "set.beton", contents, labels=names, synthetic=0 * names, index=names, storage="jpg")
    image_set = open_set([tmp_path / "set.beton"], mixed_sizes=True)
    boxes = RandomResizedCrop(64, seed=5).boxes(image_set.sizes, names)
    decoded: list[int] = []
    decode = module.decode_jpeg

    def counted(content: np.ndarray, *, reuse_buffer: bool = False) -> np.ndarray:
        image = decode(content, reuse_buffer=reuse_buffer)
        decoded.append(image.size)
        return image

    monkeypatch.setattr(module, "decode_jpeg", counted)
    out = np.empty((2, len(names), 64, 64, 3), np.uint8)
    image_set.read(names, out[0], boxes)
    parts = sum(decoded)
    decoded.clear()
    monkeypatch.setattr(module, "jpeg_part", lambda *_: None)
    image_set.read(names, out[1], boxes)
    np.testing.assert_array_equal(out[0], out[1])
    assert sum(decoded) == 3 * image_set.sizes.prod(1).sum() and parts < 0.8 * sum(decoded)
