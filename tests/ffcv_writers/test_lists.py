"""Lists as practitioners write them: each is read right, or refused with its line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from diffult.data.config import DataConfig
from diffult.data.packing import open_data
from diffult.errors import UserError
from diffult.run import command
from ffcv_writers import SourceError, open_set
from ffcv_writers.__main__ import app
from ffcv_writers.readers import LIST_FORMAT, guess_format, open_source

NAMES = ["img/0.png", "img/a b.png", "img/c,d.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "img").mkdir()
    for name in NAMES:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def read(folder: Path, content: bytes | str) -> tuple[list[str], list[int]]:
    (folder / "train.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    split = open_source("list", folder, train_list=folder / "train.txt").splits["train"]
    places = [split.samples.name(i).rpartition(", ")[0] for i in range(len(split.labels))]  # type: ignore[attr-defined]
    return [os.path.relpath(place, folder) for place in places], split.labels.tolist()


def lines(form: str, end: str = "\n") -> str:
    return "".join(form.format(name, label) + end for label, name in enumerate(NAMES))


@pytest.mark.parametrize(
    "content",
    [
        lines("{} {}"),
        lines("{}\t{}"),
        lines("  {}   {}  "),
        lines("{},{}"),
        lines("{}, {}"),
        lines("{} ; {}"),
        lines('"{}" {}'),
        lines('"{}","{}"'),
        lines("'{}',{}"),
        lines("./{} {}"),
        lines("{} 00{}"),
        lines("{} {}", "\r"),
        "\ufeff" + lines("{}\t{}", "\r\n") + "\r\n\r\n",
        "path,label\n" + lines("{},{}"),
        '"image","class"\n' + lines('"{}",{}'),
        "# made by a script\n#img/0.png 7\n\n" + lines("{} {}") + "#",
        lines("{} {}").encode("utf-16"),
        b"\xff\xfe\0\0" + lines("{} {}").encode("utf-32-le"),
        lines("{} {}").replace("img/", "img\\"),
        lines("{} {}").rstrip(),
    ],
)
def test_every_way_to_write_a_list_is_read(folder: Path, content: bytes | str) -> None:
    paths, labels = read(folder, content)
    assert [os.path.normpath(path) for path in paths] == NAMES and labels == [0, 1, 2]


@pytest.mark.parametrize(
    "content",
    [
        "img/0.png dog\nimg/a b.png cat\nimg/c,d.png dog\n",
        "path,label\nimg/0.png,dog\nimg/a b.png,cat\nimg/c,d.png,dog\n",
        '"path","label"\r\n"img/0.png","dog"\r\n"img/a b.png","cat"\r\n"img/c,d.png","dog"\r\n',
    ],
)
def test_classes_of_a_list_may_be_names_and_sort_as_folders_do(folder: Path, content: str) -> None:
    for old, new in (("cat", "cat"), ("cat", "Zebra"), ("dog", "polar bear"), ("dog", "caf\udce9")):
        if " " in new and "img/0.png dog" in content:
            new = f'"{new}"'  # after a space
        named = content.replace(old, new)
        paths, labels = read(folder, os.fsencode(named))
        names = sorted({new.strip('"'), *({"cat", "dog"} - {old})})
        expected = [new.strip('"') if name == old else name for name in ("dog", "cat", "dog")]
        source = open_source("list", folder, train_list=folder / "train.txt")
        assert paths == NAMES and source.classes == tuple(names) == tuple(source.survey["classes"])
        assert [names[label] for label in labels] == expected


def test_other_lists_have_classes_of_the_training_list_alone(folder: Path) -> None:
    (folder / "train.txt").write_text("img/0.png dog\nimg/0.png cat\nimg/0.png eel\n")
    (folder / "val.txt").write_text("img/0.png eel\nimg/0.png dog\n")
    lists = {f"{split}_list": folder / f"{split}.txt" for split in ("train", "val")}
    source = open_source("list", folder, **lists)
    assert source.classes == ("cat", "dog", "eel")
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {"train": [1, 0, 2], "val": [2, 1]}
    for content, message in (
        ("img/0.png eel\nimg/0.png hen\n", r"val\.txt:2: the training list has no class 'hen'$"),
        ("img/0.png 1\n", r"val\.txt:1: the label is the number 1, others are names, as 'cat'$"),
    ):
        (folder / "val.txt").write_text(content)
        with pytest.raises(SourceError, match=message):
            open_source("list", folder, **lists)
    (folder / "train.txt").write_text("img/0.png 0\n")
    (folder / "val.txt").write_text("img/0.png cat\n")
    with pytest.raises(SourceError, match=r"val\.txt:1: the label is not an integer .*'cat'$"):
        open_source("list", folder, **lists)


def test_names_that_look_like_another_form_are_taken_as_they_are(folder: Path) -> None:
    """Where the file is there."""
    names = ["#0.png", '"1".png', '"2"', "3\\x.png", os.fsdecode(b"4\xff.png"), " 5.png"]
    for name in names[:-1]:
        (folder / name).write_bytes(b"x")
    content = b"".join(os.fsencode(f"{name} {label}\n") for label, name in enumerate(names[:-1]))
    assert read(folder, content) == (names[:-1], [0, 1, 2, 3, 4])
    absolute = lines("{} {}").replace("img/", f"{folder}/img/")
    assert read(folder, absolute) == (NAMES, [0, 1, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines("{} {} 9"), r"train\.txt:1: .*not of more columns: 'img/0\.png 0 9'; 3 lines are wrong"),
        (lines("{},{},9"), r"train\.txt:1: .*more columns"),
        (lines('"{}",{},9'), r"train\.txt:1: .*more columns"),
        (",path,label\n0,img/0.png,0\n", r"train\.txt:1: .*the label is not an integer .*'label'"),
        ("0,img/0.png\n", r"train\.txt:1: .*'img/0\.png'$"),
        ("img/0.png 0\nimg/0.png cat\n", r"train\.txt:2: the label is not an integer from 0 to 999999 but 'cat'"),
        ("img/0.png cat\nimg/0.png 0\n", r"train\.txt:2: the label is the number 0, others are names, as 'cat'"),
        ("img/0.png cat\nimg/0.png nan\nimg/0.png 1.7\n", r"train\.txt:2: .* but 'nan'; 2 lines are wrong"),
        ("img/0.png cat\nimg/0.png dog 9\n", r"train\.txt:2: .*more columns"),
        ("img/0.png,0 9\n", r"train\.txt:1: .*more columns"),
        ("photo,species\nimg/0.png,cat\n", r"train\.txt:1: .*'species'$"),
        (",path,label\n0,img/0.png,cat\n", r"train\.txt:1: .*'label'$"),
        ("cat img/0.png\n", r"train\.txt:1: .*'img/0\.png'$"),
        ("path,label\npath,label\nimg/0.png,0\n", r"train\.txt:2: .*'label'"),
        ("img/0.png 0\nimg/0.png 1.0\nimg/0.png -1\n", r"train\.txt:2: .*'1\.0'; 2 lines are wrong"),
        ("img/0.png 1_0\n", r"'1_0'"),
        ("img/0.png \u0663\n", r"train\.txt:1: "),
        ("img/0.png 9999999\n", r"train\.txt:1: "),
        ("\nimg/0.png\n", r"train\.txt:2: a line must be 'relative/path label', not 'img/0\.png'"),
        (" , 0\n", r"train\.txt:1: a line must be"),
        ("img/0.png 0\n".encode("utf-16-le"), r"train\.txt:1: zero bytes, as in UTF-16 without its mark"),
        (b"\xff\xfe\0", r"train\.txt: not the utf-16 that it begins as"),
        ("# nothing else\n", "has no lines"),
    ],
)
def test_a_list_of_another_form_is_refused_with_its_line(folder: Path, content: bytes | str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as error:
        read(folder, content)
    assert "\n" not in str(error.value)


def test_labels_from_one_are_refused_where_a_run_starts_and_warned_of_where_a_file_is_written(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "train.txt").write_text(lines("{} {}").translate(str.maketrans("012", "123")).replace("1.png", "0.png"))
    config = DataConfig(
        source="list", path=str(folder), train_list=str(folder / "train.txt"), test_share=0.5, image_size=4
    )
    with pytest.raises(UserError, match="class 0 has no image in the train split: labels must start at 0, these at 1"):
        open_data(config)
    result = CliRunner().invoke(app, ["write", str(folder / "train.txt"), str(folder / "a.beton")])
    assert result.exit_code == 0 and "no image has the label 0" in caplog.text


def test_a_file_written_of_a_list_with_names_says_how_they_are_numbered(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second list may lack a name, and then numbers the others differently."""
    (folder / "train.txt").write_text("img/0.png dog\nimg/a b.png cat\n")
    result = CliRunner().invoke(app, ["write", str(folder / "train.txt"), str(folder / "a.beton")])
    assert result.exit_code == 0 and open_set([folder / "a.beton"]).labels.tolist() == [1, 0]
    assert "labels from 0 are the names in this list alone, sorted: cat, dog" in caplog.text


def test_names_are_found_whatever_the_locale(folder: Path) -> None:
    (folder / "\u00e9.png").write_bytes((folder / NAMES[0]).read_bytes())
    (folder / "list.txt").write_text("\u00e9.png 0\n", encoding="utf-8")
    command = [sys.executable, "-m", "ffcv_writers", "write", str(folder / "list.txt"), str(folder / "a.beton")]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0 and "1 images" in done.stdout, done.stderr


def test_the_help_of_both_commands_shows_the_format(folder: Path) -> None:
    run = typer.Typer(rich_markup_mode=None)
    run.command()(command)
    for program, words in ((app, ["write", "--help"]), (run, ["--help"])):
        text = CliRunner().invoke(program, words, terminal_width=2000).output
        assert LIST_FORMAT.split(";")[0] in " ".join(text.split())
    (folder / "list.CSV").write_text(lines("{},{}"))
    assert guess_format(folder / "list.CSV") == "list"


def test_a_pipe_in_a_list_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "img" / "pipe.png")
    (folder / "train.txt").write_text("img/0.png 0\nimg/pipe.png 1\n")
    split = open_source("list", folder, train_list=folder / "train.txt").splits["train"]
    with pytest.raises(OSError, match=r"a pipe or a device, not a file: .*pipe\.png"):
        split.samples[1]
