"""Files that are not ours, may not be read, are too many, too large or bad: each is called what it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffcv_writers import SampleError, decoding, open_set, write
from ffcv_writers.duplicates import duplicate_lines
from ffcv_writers.format import DESCRIPTOR, HEADER
from ffcv_writers.inspection import verify
from ffcv_writers.jpeg import _decode_by_pillow, decode_jpeg


def written(path: Path, number: int = 6, **options: object) -> Path:
    names = np.arange(number)
    images = np.arange(number * 192, dtype=np.uint8).reshape(number, 8, 8, 3)
    write(path, images, labels=names, synthetic=0 * names, index=names, **options)  # type: ignore[arg-type]
    return path


def command(*words: object, shell: str = "") -> subprocess.CompletedProcess[str]:
    """python -m ffcv_writers, without root's right to read everything."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    line = [*([] if os.geteuid() else drop), sys.executable, "-m", "ffcv_writers", *map(str, words)]
    program = ["bash", "-c", f'{shell} exec "$@"', "bash", *line]
    return subprocess.run(program, capture_output=True, text=True, timeout=100, check=False)


def test_a_beton_of_image_and_label_alone_says_what_it_lacks(tmp_path: Path) -> None:
    """As ffcv's own examples write it."""
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    rows = [(np.full((8, 8, 3), n, np.uint8), n % 3) for n in range(4)]
    fields = {"image": RGBImageField("raw"), "label": IntField()}
    DatasetWriter(str(tmp_path / "a.beton"), fields, num_workers=1).from_indexed_dataset(rows, chunksize=2)
    with pytest.raises(ValueError, match="no image set of ours: it has the fields image, label and lacks synthetic, i"):
        open_set([tmp_path / "a.beton"])
    content = written(tmp_path / "a.beton").read_bytes()
    (tmp_path / "a.beton").write_bytes(
        content.replace(b"index", b"INDEX").replace(b"label", b"index").replace(b"INDEX", b"label")
    )
    with pytest.raises(ValueError, match="needs image, label, synthetic, index alone and in this order"):
        open_set([tmp_path / "a.beton"])


def test_any_change_of_a_table_is_damage_and_ffcvs_own_files_need_no_checksum(tmp_path: Path) -> None:
    path = written(tmp_path / "a.beton", storage="raw")
    content = path.read_bytes()
    tables = HEADER.itemsize + 4 * DESCRIPTOR.itemsize
    label = tables + 16 + 8  # of the second image's row, at least
    for place in (4, tables - 1040, tables - 1000, tables - 1, label, label + 9, len(content) - 1, len(content) - 20):
        changed = bytearray(content)
        changed[place] ^= 4
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"is damaged or not an image set of ours|lacks index"):
            open_set([path])
    start = tables - 1024
    path.write_bytes(content[:start] + bytes(1024) + content[tables:])  # as ffcv writes it
    np.testing.assert_array_equal(open_set([path]).labels, np.arange(6))


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    path = written(tmp_path / "a.beton")
    path.chmod(0)
    done = command("info", path)
    assert done.returncode == 2 and re.fullmatch(f"error: .*{path}.* (not readable|Permission denied).*\n", done.stderr)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "train" / "a" / f"{number}.png")
    (tmp_path / "train" / "a" / "1.png").chmod(0)
    done = command("write", tmp_path, tmp_path / "b.beton")
    assert done.returncode == 2 and done.stderr.endswith("train/a/1.png) could not be read: Permission denied\n")


def test_more_files_than_a_process_may_open_name_the_limit(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{number}.beton") for number in range(60)]
    done = command("info", *paths, shell="ulimit -n 50;")
    if sys.version_info < (3, 13):
        message = r"error: .*\d+\.beton: a process may have 50 files open here \(ulimit -n\) and these are more\n"
        assert done.returncode == 2 and re.fullmatch(message, done.stderr)
    else:
        assert done.returncode == 0


def _decode_rgb(content: np.ndarray) -> np.ndarray:
    return decoding.decode_rgb(content.tobytes())


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("decode", [decode_jpeg, _decode_by_pillow, _decode_rgb])
def test_one_limit_of_pixels_whatever_decodes(tmp_path: Path, decode: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be written can be read: between 89 and 179 million pixels, too."""
    assert decoding.MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(decoding, "MAX_PIXELS", 3000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    for size in ((50, 60), (50, 61)):
        Image.new("RGB", size).save(tmp_path / "a.jpg")
        content = np.fromfile(tmp_path / "a.jpg", np.uint8)
        if size[1] == 60:
            assert decode(content).shape == (60, 50, 3)  # type: ignore[operator]
        else:
            with pytest.raises(ValueError, match=r"^it (is|has) .*(more than|3,000)"):
                decode(content)  # type: ignore[operator]


def test_a_photo_larger_than_a_page_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of 16 KB here, of 64 MB else: 24 megapixels are more."""
    monkeypatch.setattr("ffcv_writers.writing._MIXED_PAGE", 1 << 14)
    shapes = [(30, 30), (60, 70), (200, 100), (70, 70), (300, 80), (20, 20)]
    images = [np.random.default_rng(n).integers(0, 256, (*shape, 3), dtype=np.uint8) for n, shape in enumerate(shapes)]
    names = np.arange(6)
    write(tmp_path / "a.beton", images, labels=names, synthetic=0 * names, index=names)  # type: ignore[arg-type]
    image_set = open_set([tmp_path / "a.beton"], mixed_sizes=True)
    for number, image in enumerate(images):
        np.testing.assert_array_equal(image_set.image(number), image)
    assert verify([tmp_path / "a.beton"]) == []


class Files:
    """Contents, some of which are none."""

    def __init__(self, bad: set[int], count: int = 100) -> None:
        self.bad, self.count = bad, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> np.ndarray | bytes:
        return b"" if number in self.bad else np.full((8, 8, 3), number, np.uint8)

    def name(self, number: int) -> str:
        return f"{number}.png"


def test_all_bad_images_are_counted_and_the_first_named(tmp_path: Path) -> None:
    names, ticks = np.arange(100), iter(range(101))
    with pytest.raises(SampleError) as error:
        write(
            tmp_path / "a.beton", Files({3, 40, 41, 99}), labels=names, synthetic=0 * names, index=names, workers=2,
            progress=lambda: next(ticks),
        )  # fmt: skip
    begin, end = f"{tmp_path / 'a.beton'}: sample ", "could not be read: the file is empty; "
    assert str(error.value) == (
        f"4 of 100 images cannot be read: {begin}3 (3.png) {end}{begin}40 (40.png) {end}{begin}41 (41.png) {end}..."
    )
    assert next(ticks) == 100 and os.listdir(tmp_path) == []


def test_duplicates_are_counted_within_and_across(tmp_path: Path) -> None:
    images = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    columns = {name: np.zeros(5, int) for name in ("labels", "synthetic", "index")}
    chosen = {"train": [0, 1, 1, 2, 1], "val": [5, 6, 7, 8, 9], "test": [9, 1, 3, 1, 4]}
    labels = {"train": np.array([0, 1, 1, 1, 2]), "val": np.arange(5), "test": np.array([0, 1, 0, 0, 0])}
    digests = {
        split: write(tmp_path / "a.beton", images[numbers], **columns) for split, numbers in chosen.items()
    }  # fmt: skip
    assert duplicate_lines(digests, labels, "{} {}".format) == [
        "train: 2 of 5 images repeat others of it, such as train 2 that is train 1; 1 of them with another label",
        "test: 1 of 5 images repeat others of it, such as test 3 that is test 1; 1 of them with another label",
        "test: 2 of 5 images are in train too, such as test 1 that is train 1; 1 of them with another label; what is "
        "measured on them is too good: remove them from one",
        "test: 1 of 5 images are in val too, such as test 0 that is val 4; 1 of them with another label; what is "
        "measured on them is too good: remove them from one",
    ]
    assert duplicate_lines({"train": digests["val"]}, labels, "{} {}".format) == []
    flat = write(tmp_path / "b.beton", images[:1].reshape(1, 16, 4, 3), **{k: v[:1] for k, v in columns.items()})
    assert flat[0] != digests["train"][0]  # the same bytes in another shape
