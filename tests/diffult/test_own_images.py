"""Own images from the command to the report: what is seen of them, what is planned, and what is refused in a line."""

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffult.comments import comments_in
from diffult.config import read_config
from diffult.data.survey import locate, take_survey
from diffult.engine.distributed import ALONE
from diffult.errors import UserError
from diffult.planning import propose, timing
from diffult.run import command, open_data_run
from ffcv_writers.readers.source import Contents, Source, Split

TINY = [
    "extractor.steps=12", "diffusion.steps=6", "diffusion.batch_size=8", "unet.channels=8", "generate.steps=2",
    "generate.balance_to=6", "generate.filter=none", "classifier.steps=8", "classifier.methods=['ce', 'diffult']",
]  # fmt: skip


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """A small step of each network is timed, not a second."""
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_WORK", {"cpu": 1e8})


def write_images(root: Path, counts: dict[str, int], mode: str = "RGB", size: tuple[int, int] = (20, 16)) -> Path:
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_images(tmp_path / "animals", {"cat": 12, "dog": 5, "owl": 2})


def test_one_folder_becomes_a_finished_run_and_the_same_command_resumes(folder, tmp_path, capsys, caplog):
    run = tmp_path / "run"
    command(run=run, data=folder, hours=0.01, set_=TINY)
    printed = capsys.readouterr().out
    assert (
        "19 images of 3 classes (12 down to 2), 16 pixels, colour" in printed
        and "every class filled up to 6" in printed
    )
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["ce"]["top1"] is not None and metrics["diffult"]["top1"] is not None
    assert (run / "report.html").stat().st_size > 10_000
    assert json.loads((run / "pack" / "packed.json").read_text())["counts"] == {
        "train": [9, 4, 2],
        "test": [2, 1, 0],
        "val": [1, 0, 0],
    }
    file = run / "config.toml"
    config, comments = read_config(file), comments_in(file.read_text())
    assert config.name == "animals" and config.data.image_size == 16 and config.data.path == str(folder)
    assert comments["diffusion.steps"] == "Set on the command line." and "test split" in comments["data.test_share"]
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "report.html"}
    command(run=run, data=folder, hours=0.01, set_=TINY)
    assert "stage" not in capsys.readouterr().out  # nothing is planned anew
    assert {path: path.stat().st_mtime_ns for path in times} == times
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"planned for --hours 0.01, not 2; .* give another --run to plan anew"):
        command(run=run, data=moved, hours=2.0)
    command(run=run, data=moved, set_=["generate.batch_size=9"])
    assert read_config(file).data.path == str(moved) and "data.test_share" in comments_in(file.read_text())
    with pytest.raises(UserError, match="holds a run, with its plan in"):
        command(run=run, data=moved, plan=True)


def test_the_plan_alone_is_printed_and_written_and_may_be_made_again(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command(data=folder, plan=True)
    lines = capsys.readouterr().out.splitlines()
    run = tmp_path / "runs" / "animals"
    assert [path.name for path in run.iterdir() if path.name != ".lock"] == ["config.toml"]
    text = (run / "config.toml").read_text()
    assert "diffult.run" not in text and "# The set has no test split" in text
    command(data=folder, plan=True, hours=0.01, set_=["seed=7"])
    assert "does not fit" in capsys.readouterr().out and read_config(run / "config.toml").seed == 7
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("seed = 7", "seed = 8"))  # by hand
    opened = open_data_run(run, folder, None, [], ALONE)
    assert opened.config.seed == 8 and "data.test_share" in opened.comments
    assert open_data_run(run, folder, 0.01, [], ALONE).config.seed == 8  # the hours of the plan, too
    with pytest.raises(UserError, match=r"was planned for --hours 0.01, not 3; .* give --plan to plan anew"):
        open_data_run(run, folder, 3.0, [], ALONE)
    assert read_config(run / "config.toml").seed == 8
    stages = ["stage", "pack", "extractor", "diffusion", "generate", "classifier", "evaluate", "together"]
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("  stage ")) :]
    rows = {line.split()[0]: line for line in table if line.split()[0] in stages}
    assert list(rows) == stages and all("B" in rows[stage] for stage in stages[1:])
    assert any("none is tested: owl (1 of 3 classes)" in line for line in lines)


def test_grey_files_are_stored_grey_and_colours_hide_in_no_mode(tmp_path):
    grey = write_images(tmp_path / "grey", {"a": 3, "b": 3}, "L")
    coloured = write_images(tmp_path / "colour", {"a": 3, "b": 3}, "P")
    as_colour = tmp_path / "as_colour"
    for name in ("a", "b"):
        (as_colour / name).mkdir(parents=True)
        for file in (grey / name).iterdir():
            Image.open(file).convert("RGB").save(as_colour / name / f"{file.stem}.jpg")
    assert [take_survey(path).colour for path in (grey, coloured, as_colour)] == [False, True, False]
    assert take_survey(grey).sides.tolist() == [[16, 20]] * 6


def test_colours_of_a_rare_class_are_seen(tmp_path):
    write_images(tmp_path / "set", {"a": 900, "b": 1}, "L", (8, 8))
    assert not take_survey(tmp_path / "set").colour
    write_images(tmp_path / "set", {"c": 1}, "RGB", (8, 8))
    assert take_survey(tmp_path / "set").colour


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_files_of_every_kind_and_size_are_surveyed(tmp_path, mode):
    for name, sides in {"a": (20, 16), "b": (300, 9)}.items():
        (tmp_path / name).mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (*sides, 3), np.uint8)
        deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 256)
        image = deep if mode == "I;16" else Image.fromarray(noise).convert(mode)
        image.save(tmp_path / name / ("0.jpg" if mode == "CMYK" else "0.png"))
    survey = take_survey(tmp_path)
    assert survey.colour == (mode in ("P", "RGB", "RGBA", "CMYK"))
    assert sorted(survey.sides.tolist()) == [[20, 16], [300, 9]] and survey.counts.tolist() == [1, 1]


def test_of_a_million_files_some_hundred_are_opened(tmp_path, monkeypatch):
    file = write_images(tmp_path / "one", {"a": 1}) / "a" / "0.png"
    opened = []
    counts = np.maximum(1, 1000 * 0.999 ** np.arange(8142)).astype(int)
    labels = np.repeat(np.arange(8142), counts)
    samples = Contents(len(labels), lambda number: opened.append(number) or file.read_bytes(), str)
    classes = tuple(f"species{i}" for i in range(8142))
    source = Source({}, lambda: ({"train": Split(samples, labels)}, classes))
    monkeypatch.setattr("diffult.data.survey.open_source", lambda *_, **__: source)
    survey = take_survey(tmp_path)
    assert survey.counts.sum() > 990_000 and survey.colour
    assert len(opened) <= 400 and len({labels[number] for number in opened}) > 200


def test_a_test_folder_is_the_test_split_and_is_not_cut(tmp_path):
    write_images(tmp_path / "set" / "train", {"cat": 12, "dog": 5})
    write_images(tmp_path / "set" / "test", {"cat": 4, "dog": 4})
    survey = take_survey(tmp_path / "set")
    assert survey.test == 8 and survey.val is None and survey.counts.tolist() == [12, 5]


def test_other_kinds_are_known_by_their_names(tmp_path):
    folder = write_images(tmp_path / "images", {"a": 3, "b": 3})
    for split in ("train", "test"):
        (folder / f"my_{split}.txt").write_text("".join(f"{c}/{i}.png {c == 'b':d}\n" for c in "ab" for i in range(3)))
    place = {"source": "list", "path": str(folder), "train_list": str(folder / "my_train.txt")}
    assert locate(folder / "my_train.txt") == place | {"test_list": str(folder / "my_test.txt")}
    assert take_survey(folder / "my_train.txt").test == 6
    arrays = tmp_path / "arrays.npz"
    np.savez(arrays, images=np.zeros((6, 12, 12), np.uint8), labels=[0, 0, 0, 0, 1, 1])
    survey = take_survey(arrays)
    assert (survey.place["source"], survey.counts.tolist(), survey.arrays, survey.colour) == (
        "npz",
        [4, 2],
        True,
        False,
    )
    np.savez(arrays, images=np.zeros((6, 12, 10), np.uint8), labels=[0, 0, 0, 0, 1, 1])
    with pytest.raises(UserError, match="12x10 pixels and 1 channels; need squares"):
        take_survey(arrays)


def test_what_cannot_be_planned_is_refused_in_a_line(folder, tmp_path):
    def refused(message: str, **options) -> None:
        with pytest.raises(UserError, match=message) as caught:
            command(**{"run": tmp_path / "run"} | options)
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()

    refused("nowhere does not exist", data=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("empty has no class folders", data=tmp_path / "empty")
    refused("holds one class alone, 'cat'", data=write_images(tmp_path / "one", {"cat": 4}))
    refused("none can be taken out of it", data=write_images(tmp_path / "few", {"cat": 2, "dog": 1}))
    refused("no class has 3 images left to train on", data=write_images(tmp_path / "three", {"cat": 3, "dog": 1}))
    (tmp_path / "notes.doc").write_text("")
    refused("neither a folder of images nor", data=tmp_path / "notes.doc")
    (tmp_path / "one" / "my_train.txt").write_text("cat/0.png 0")
    refused("should my_train.txt list the images, give --data .*my_train.txt", data=tmp_path / "one")
    refused("give one of the two", data=folder, preset="digits-lt")
    refused("give --data DIR, too", plan=True)
    refused("unknown key 'difusion'; did you mean 'diffusion'", data=folder, set_=["difusion.steps=3"])
    refused("--hours -1: expected a number above 0", data=folder, hours=-1.0)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    refused(r"none of the 19 images looked at can be read \(.*cat/0.png: not an image", data=folder)


def test_seconds_a_stage_are_measured_on_this_machine(folder, tmp_path):
    plan = propose(folder, 2.0, TINY, tmp_path, ALONE)
    assert tomllib.loads(plan.config.to_toml(plan.comments))["unet"]["channels"] == 8
    guessed = timing.guess(tmp_path)
    speeds = timing.measure(plan.config, 3, tmp_path)
    assert min(speeds.train, speeds.sample, speeds.classify) > 0
    assert speeds.disk == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1) and speeds.decode == guessed.decode
