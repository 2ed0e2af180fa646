"""Image folders: images are found as torchvision's ImageFolder finds them, and what is passed over is counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from ffcv_writers import SourceError
from ffcv_writers.readers import guess_format, open_source


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")


def found(root: Path, split: str = "train") -> list[tuple[str, int]]:
    part = open_source("folder", root).splits[split]
    return [(part.samples.name(i), label) for i, label in enumerate(part.labels.tolist())]  # type: ignore[attr-defined]


def test_nested_images_are_found_in_torchvisions_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in Tiny ImageNet, train/WNID/images/*.JPEG, and some directly in the class; through links, too."""
    root = tmp_path / "set" / "train"
    for name in ("n1/images/1.JPEG", "n1/images/0.JPEG", "n1/z.png", "n1/a/b/c.PNG", "n2/b-2/0.png", "n2/b/1.png"):
        image(root / name)
    (root / "n1" / "n1_boxes.txt").write_text("x")
    image(tmp_path / "elsewhere" / "9.png")
    (root / "n3").symlink_to(tmp_path / "elsewhere")
    (root / "n2" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "n2" / "linked.png").symlink_to(tmp_path / "elsewhere" / "9.png")
    theirs = ImageFolder(str(root))
    assert found(tmp_path / "set") == theirs.samples and len(theirs.samples) == 9
    assert open_source("folder", tmp_path / "set").classes == tuple(theirs.classes)
    assert "train: skipped 1 file: 1 not named like an image (.txt)" in caplog.text
    assert "6 of 9 images lie in folders below those of their classes" in caplog.text


def test_what_is_passed_over_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/a/0.png", "train/a/.1.png", "train/a/._0.png", "train/a/.cache/2.png", "train/b/0.png"):
        image(tmp_path / name)
    for name in ("train/a/1.heic", "train/a/2.heic", "train/b/readme", "train/a/.DS_Store"):
        (tmp_path / name).write_text("")
    for number in range(2):
        (tmp_path / "train" / "b" / f"gone{number}.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "train" / "b" / "pipe.png")
    (tmp_path / "train" / "b" / "again").symlink_to(tmp_path / "train" / "b")
    (tmp_path / "train" / "c").symlink_to(tmp_path / "nowhere")
    (tmp_path / "train" / "b" / "itself").symlink_to(tmp_path / "train" / "b" / "itself")
    image(tmp_path / "train" / "loose.png")
    image(tmp_path / "unlabelled" / "x.png")
    assert [path for path, _ in found(tmp_path)] == [str(tmp_path / "train" / name / "0.png") for name in "ab"]
    for words in (
        f"{tmp_path}: not read, as in no split folder: 1 folder\n",
        "train: not read, as in no class folder: 1 dangling link, 1 image\n",
        "train: skipped 9 files: 3 dangling links, 2 not named like an image (.heic), ",
        "1 hidden", "1 not named like an image (no ending)", "1 link to a folder around them",
        "1 neither file nor folder",
    ):  # fmt: skip
        assert words in caplog.text


def test_splits_are_found_by_their_usual_names(tmp_path: Path) -> None:
    for split in ("Train", "valid", "TESTING"):
        image(tmp_path / split / "cat" / "0.png")
    assert [*open_source("folder", tmp_path).splits] == ["train", "val", "test"]
    image(tmp_path / "val" / "cat" / "0.png")
    with pytest.raises(SourceError, match="val and valid are both the val split"):
        open_source("folder", tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/0.png", "test/1.png"], "test, train is named like a split but holds no class folders"),
        (["train/0.png"], "train is named like a split"),
        (["train/a/0.heic", "train/b/0.png"], r"class a has no image .* but 1 not named like an image \(\.heic\): add"),
        (["train/a/x/0", "train/b/x/0", "train/c/0.png"], r"class a has no image .*; 2 classes have none"),
        (["train/a/0.png", "val/images/0.png"], r"only one has a: it is in .*train, not in .*val; 2 classes differ"),
        (["0.png"], "has no class folders"),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        image(tmp_path / name)
    with pytest.raises(SourceError, match=message):
        open_source("folder", tmp_path)


def test_a_class_may_be_called_train_and_an_archive_may_lie_beside_the_classes(tmp_path: Path) -> None:
    for name in ("bus", "car", "train"):
        image(tmp_path / name / "0.png")
    (tmp_path / "download.tar").write_bytes(b"")
    assert guess_format(tmp_path) == "folder" and open_source("folder", tmp_path).classes == ("bus", "car", "train")


def test_numbered_classes_are_sorted_as_torchvision_does_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(12):
        image(tmp_path / str(number) / "0.png")
    assert open_source("folder", tmp_path).classes == tuple(ImageFolder(str(tmp_path)).classes)
    assert "sorted as text, as torchvision does: class 10 has the label 2" in caplog.text


def test_a_folder_that_may_not_be_read_is_not_called_empty(tmp_path: Path) -> None:
    """In a process without root's right to read all."""
    image(tmp_path / "a" / "0.png")
    (tmp_path / "a").chmod(0)
    program = "import sys; from ffcv_writers.__main__ import main; main()"
    command = [sys.executable, "-c", program, "write", str(tmp_path), str(tmp_path / "a.beton"), "--format", "folder"]
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    words = command if os.geteuid() else [*drop, *command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    finally:
        (tmp_path / "a").chmod(0o755)
    assert done.returncode == 2 and f"error: cannot read {tmp_path / 'a'}: Permission denied\n" == done.stderr


@pytest.mark.parametrize("name", ["meta", "batches.meta", "train-images-idx3-ubyte"])
def test_a_class_may_be_called_as_a_file_of_an_archive(tmp_path: Path, name: str) -> None:
    for each in (name, "other"):
        image(tmp_path / each / "0.png")
    assert guess_format(tmp_path) == "folder"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "meta").touch()
    assert guess_format(tmp_path / "notes") == "folder"


def test_a_hidden_folder_of_images_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/0.png", ".net/0.png"):
        image(tmp_path / name)
    (tmp_path / ".git").mkdir()
    assert open_source("folder", tmp_path).classes == ("a",)
    assert caplog.messages == [f"{tmp_path}: not read, as in no class folder: 1 hidden folder of images"]


def test_classes_have_the_same_names_under_any_locale(tmp_path: Path) -> None:
    names = ["a", "caf\udce9", "été", "🙂"]
    for name in names:
        image(tmp_path / name / "0.png")
    code = "import sys; from ffcv_writers.readers import open_source; print(ascii(open_source('folder', sys.argv[1])"
    told = subprocess.run(
        [sys.executable, "-c", f"{code}.classes))", str(tmp_path)],
        env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == ascii(open_source("folder", tmp_path).classes) == ascii((*sorted(names),))
