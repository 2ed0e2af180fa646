"""python -m ffcv_writers: every source, and the error for a bad one."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import ffcv_writers
from ffcv_writers import SourceError, open_set
from ffcv_writers.__main__ import app
from ffcv_writers.readers import READERS, Split, guess_format, open_source, survey_differences


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


IMAGES, LABELS = pixels(12), np.arange(12) % 3


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def in_folders(root: Path) -> Path:
    for number, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        path = root / "train" / f"n{label}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return root


def in_list(root: Path) -> Path:
    (root / "images").mkdir()
    for number, image in enumerate(IMAGES):
        (root / "images" / f"{number} x.png").write_bytes(png(image))
    lines = [f"images/{number} x.png {label}" for number, label in enumerate(LABELS)]
    (root / "train.txt").write_text("\n".join(lines) + "\n")
    return root / "train.txt"


def in_idx(root: Path) -> Path:
    for name, values in (("images-idx3", IMAGES[..., 0]), ("labels-idx1", LABELS)):
        header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        (root / f"train-{name}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())
    return root


def in_cifar(root: Path) -> Path:
    planes = IMAGES.transpose(0, 3, 1, 2).reshape(12, 3072)
    for name, chosen in (("train", slice(0, 12)), ("test", slice(0, 3))):
        content = {"data": planes[chosen], "fine_labels": LABELS[chosen].tolist()}
        (root / name).write_bytes(pickle.dumps(content))
    (root / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b", "c"]}))
    (root / "batches.meta").unlink(missing_ok=True)
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (root / name).rename(folder / name)
    return root


def in_npz(root: Path) -> Path:
    np.savez(
        root / "some.npz",
        train_images=IMAGES,
        train_labels=LABELS[:, None],
        test_images=IMAGES[:1],
        test_labels=LABELS[:1],
    )
    return root / "some.npz"


def in_tar(root: Path) -> Path:
    for part in range(2):
        with tarfile.open(root / f"{part}.tar", "w") as archive:
            for number in range(6 * part, 6 * part + 6):
                for ending, content in ((".cls", f"{LABELS[number]}\n".encode()), (".PNG", png(IMAGES[number]))):
                    member = tarfile.TarInfo(f"./a.b/{number:03}{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return root


SOURCES = [in_folders, in_list, in_idx, in_cifar, in_npz, in_tar]


@pytest.mark.parametrize("make", SOURCES)
def test_every_source_is_written_as_it_is(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    place = tmp_path / "source"
    place.mkdir()
    source, out = make(place), tmp_path / "set.beton"
    result = CliRunner().invoke(app, ["write", str(source), str(out), "--workers", "2"], catch_exceptions=False)
    assert result.exit_code == 0 and re.search(r"wrote .*set\.beton: \d+ images, .* images/s", result.output)
    image_set = open_set([out])
    read = image_set.take(np.arange(len(image_set)))
    order = np.arange(12)
    if make is in_folders:
        order = np.argsort(LABELS, kind="stable")
    np.testing.assert_array_equal(read, IMAGES[order][..., :1] if make is in_idx else IMAGES[order])
    np.testing.assert_array_equal(image_set.labels, LABELS[order])
    np.testing.assert_array_equal(image_set.index, np.arange(12))
    assert not image_set.synthetic.any()


def test_write_info_verify(tmp_path: Path) -> None:
    source, run = str(in_folders(tmp_path / "source")), CliRunner()

    def run_command(*words: object) -> str:
        result = run.invoke(app, list(map(str, words)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return re.sub(" +", " ", result.output)

    real, generated = tmp_path / "real.beton", tmp_path / "generated.beton"
    run_command("write", source, real, "--storage", "jpg", "--max-short-side", "20")
    run_command("write", source, generated, "--synthetic", "--max-short-side", "20")
    info = run_command("info", real, generated)
    lines = ["files 2", "images 24", "real 12", "synthetic 12", "classes 3", "labels 0 to 2", "images a class 8 to 8"]
    for line in [*lines, "height 20 to 20", "channels 3", "storage 12 raw, 12 jpg"]:
        assert f" {line}\n" in info, info
    assert "all 24 samples can be read" in run_command("verify", real, generated, "--classes", "3")
    result = run.invoke(app, ["verify", str(generated), "--classes", "4"])
    assert result.exit_code == 1 and "1 classes have no sample, 3 the first" in result.output
    result = run.invoke(app, ["verify", str(generated), str(generated)])
    assert result.exit_code == 1 and "12 names are given twice" in result.output


@pytest.mark.timeout(200)
def test_the_command_itself(tmp_path: Path) -> None:
    """Exit codes, one line of error, and nothing left behind."""
    source = in_folders(tmp_path / "source")
    broken = source / "train" / "n1" / "04.png"
    broken.write_bytes(broken.read_bytes()[:300])
    command = [sys.executable, "-m", "ffcv_writers", "write", str(source), str(tmp_path / "set.beton")]
    environment = os.environ | {"PYTHONPATH": str(Path(ffcv_writers.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 2 and not done.stdout
    assert re.search(r"error: .*set\.beton: sample 5 \(.*n1/04\.png\) could not be read: .*truncated\n$", done.stderr)
    assert os.listdir(tmp_path) == ["source"]


def opened(format: str, path: Path) -> dict[str, Split]:
    return open_source(format, path).splits


def test_bad_sources_are_refused_in_a_line(tmp_path: Path) -> None:
    for name in ("folder", "idx", "tar"):
        (tmp_path / name).mkdir()
    for attempt in (lambda: guess_format(tmp_path / "nowhere"), lambda: open_source("idx", tmp_path / "nowhere")):
        with pytest.raises(SourceError, match="nowhere does not exist"):
            attempt()
    with pytest.raises(SourceError, match="has no class folders"):
        open_source("folder", tmp_path / "folder")
    (tmp_path / "odd.xyz").touch()
    with pytest.raises(SourceError, match=r"odd\.xyz: unknown format, give --format, one of digits, idx"):
        guess_format(tmp_path / "odd.xyz")
    with pytest.raises(SourceError, match=f"unknown format 'beton': choose one of {', '.join(READERS)}"):
        open_source("beton", tmp_path / "odd.xyz")
    with pytest.raises(SourceError, match="train_labels, but other"):
        np.savez(tmp_path / "other.npz", other=IMAGES)
        opened("npz", tmp_path / "other.npz")
    with pytest.raises(SourceError, match=r"need uint8 images .* got float64 \(2, 3, 3, 1\)"):
        np.savez(tmp_path / "other.npz", images=np.zeros((2, 3, 3)), labels=np.zeros(2, int))
        opened("npz", tmp_path / "other.npz")
    with pytest.raises(SourceError, match=r"cannot read .*Object arrays"):
        np.savez(tmp_path / "other.npz", images=np.array([None]), labels=np.zeros(1, int))
        opened("npz", tmp_path / "other.npz")
    with pytest.raises(SourceError, match=r"tar holds no \.tar"):
        open_source("tar", tmp_path / "tar")
    tar = in_tar(tmp_path / "tar") / "1.tar"
    tar.write_bytes(tar.read_bytes().replace(b"007.cls", b"007.txt"))
    with pytest.raises(SourceError, match=r"cannot read .*1\.tar: damaged at byte 5120"):
        opened("tar", tar)
    with tarfile.open(tar, "w") as archive:
        archive.addfile(tarfile.TarInfo("007.jpg"), io.BytesIO())
    with pytest.raises(SourceError, match=r"007 needs an image and a \.cls file"):
        opened("tar", tar)
    result = CliRunner().invoke(app, ["write", str(in_idx(tmp_path / "idx")), "out.beton", "--split", "val"])
    assert isinstance(result.exception, SourceError) and "has no split 'val', only train" in str(result.exception)


def test_the_help_names_every_reader() -> None:
    text = " ".join(CliRunner().invoke(app, ["write", "--help"]).output.split())
    assert f"{', '.join(READERS)}; default: as it looks" in text


def test_archives_with_splits(tmp_path: Path) -> None:
    for make in (in_npz, in_tar):
        make(tmp_path)
    assert {split: len(part.labels) for split, part in opened("npz", tmp_path / "some.npz").items()} == {
        "train": 12,
        "test": 1,
    }
    for before, after in (("0.tar", "train-0.tar"), ("1.tar", "val/1.tar")):
        (tmp_path / after).parent.mkdir(exist_ok=True)
        (tmp_path / before).rename(tmp_path / after)
    for split, numbers in opened("tar", tmp_path).items():
        chosen = slice(0, 6) if split == "train" else slice(6, 12)
        assert numbers.labels.tolist() == LABELS[chosen].tolist()
        assert numbers.samples[3] == png(IMAGES[chosen][3]) and numbers.samples.name(3).endswith(".PNG")  # type: ignore[attr-defined]


def test_a_survey_shows_what_has_changed(tmp_path: Path) -> None:
    """Through JSON, as it is kept; names need not be UTF-8."""
    root = in_folders(tmp_path / "source")
    bad = os.fsdecode(b"n3\xff")
    (root / "train" / bad).mkdir()
    (root / "train" / bad / "0.png").write_bytes(png(IMAGES[0]))

    def survey(format: str = "folder", path: Path = root) -> dict[str, object]:
        return json.loads(json.dumps(open_source(format, path).survey))

    before = survey()
    assert before["classes"] == ["n0", "n1", "n2", bad] and before["splits"]["train"]["counts"] == [4, 4, 4, 1]  # type: ignore[index]
    assert survey_differences(before, survey()) == []
    (root / "train" / "n1" / "04.png").rename(root / "train" / "n2" / "04.png")
    more = ["train: 1 image fewer in class 'n1'", "train: 1 image more in class 'n2'"]
    assert survey_differences(before, survey()) == more
    (root / "train" / "n2" / "04.png").rename(root / "train" / "n1" / "05.png")
    assert survey_differences(before, survey()) == ["train: other files or sizes"]
    (root / "train" / "n1" / "05.png").rename(root / "train" / "n1" / "04.png")
    assert survey_differences(before, survey()) == []
    with (root / "train" / "n1" / "04.png").open("ab") as file:
        file.write(b"x")
    assert survey_differences(before, survey()) == ["train: other files or sizes"]
    (root / "train" / bad).rename(root / "train" / "dog")
    assert survey_differences(before, survey()) == [f"class {bad!r} is gone", "class 'dog' is new"]
    shutil.copytree(root / "train", root / "val")
    assert "the split val is new" in survey_differences(before, survey())
    (root / "train.txt").write_text("a 0\nb 1\nc 0\n")
    listed = open_source("list", root, train_list=root / "train.txt").survey
    (root / "train.txt").write_text("a 0\nb 0\nc 1\n")
    changed = open_source("list", root, train_list=root / "train.txt").survey
    assert survey_differences(listed, changed) == ["train: other files or sizes"]
    archive = in_npz(tmp_path)
    before = survey("npz", archive)
    assert survey_differences(before, survey("npz", archive)) == []
    size = archive.stat().st_size
    with archive.open("ab") as file:
        file.write(b"x")
    assert survey_differences(before, survey("npz", archive)) == [f"the file some.npz has {size + 1} bytes, not {size}"]
    assert survey_differences(before, {"files": {}}) == ["the file some.npz is gone"]
