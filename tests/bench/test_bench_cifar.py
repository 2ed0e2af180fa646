"""CIFAR10-LT within a time limit: the plan by hand, the data it takes, and all of it on the digits."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench import cifar
from diffult.config import load_preset
from diffult.errors import UserError
from diffult.runs.stages import STAGES

FIXED = {"pack": 15, "extractor": 40, "measuring": 75, "classifier": 110, "evaluate": 10, "report": 5}  # 255 s


@pytest.mark.parametrize(
    ("budget", "diffusion_flop", "diffusion_s"),
    [
        (510, 1e15, 205),  # wants 5000 s; 510 - 255 - 50 are left
        (510, 4e12, 20),  # wants less than is left
        (300, 1e15, 0),  # nothing is left
    ],
)
def test_the_diffusion_model_gets_what_the_other_stages_leave(
    budget: float, diffusion_flop: float, diffusion_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card of 1 TFLOP/s, a fifth of which is reached: 2e12 FLOP of drawing are 10 s, on top of 40."""
    asked = []

    def stage_flops(*arguments: object) -> dict[str, float]:
        asked.append(arguments)
        return {"extractor": 1e9, "diffusion": diffusion_flop, "generate": 2e12, "classifier": 1e9}

    monkeypatch.setattr(cifar, "stage_flops", stage_flops)
    config = load_preset(cifar.PRESET)
    planned = cifar.plan(config, budget, 1e12)
    assert planned == pytest.approx(FIXED | {"generate": 50, "diffusion": diffusion_s})
    # CIFAR10-LT with factor 100 has 12,406 images (Cao et al. 2019); every class is filled to 5000, with a fifth more
    # candidates than samples.
    assert asked == [(config, 10, pytest.approx(1.2 * (50_000 - 12_406)))]


@pytest.mark.parametrize(
    ("seconds", "a_step", "wanted", "steps"),
    [
        (100, 0.01, 16_000, 9500),
        (1000, 0.01, 16_000, 16_000),
        (0.5, 0.01, 16_000, 100),
        (-60, 0.01, 16_000, 100),  # the time is up already
        (100, 0.01, 4, 4),  # never more than the preset's
    ],
)
def test_steps_fill_the_time_within_limits(seconds: float, a_step: float, wanted: int, steps: int) -> None:
    assert cifar.steps_within(seconds, a_step, wanted) == steps


def tar_of(file: Path, *names: str) -> Path:
    with tarfile.open(file, "w:gz") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return file


def test_images_are_found_in_folders_and_archives_and_the_rest_is_refused(tmp_path: Path) -> None:
    copy, scratch = "CIFAR-10 (JPEG copy)", tmp_path / "scratch"
    (tmp_path / "images/train/cat").mkdir(parents=True)
    assert cifar.data_settings(tmp_path / "images", scratch) == (
        copy, ["data.source=folder", f"data.path={tmp_path}/images"],
    )  # fmt: skip
    flat = tar_of(tmp_path / "flat.tar.gz", "train/cat/0.jpg", "test/cat/0.jpg")
    assert cifar.data_settings(flat, scratch / "a") == (copy, ["data.source=folder", f"data.path={scratch}/a"])
    nested = tar_of(tmp_path / "nested.tar.gz", "cifar10/train/cat/0.jpg")
    assert cifar.data_settings(nested, scratch / "b")[1][1] == f"data.path={scratch}/b/cifar10"
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.touch()
    assert cifar.data_settings(archive, scratch) == ("CIFAR-10", [f"data.path={archive}"])
    with pytest.raises(UserError, match=r"none\.tar\.gz: not found; give CIFAR-10's"):
        cifar.data_settings(tmp_path / "none.tar.gz", scratch)
    flat.write_bytes(flat.read_bytes()[:40])
    with pytest.raises(UserError, match=r"flat\.tar\.gz: cannot be unpacked"):
        cifar.data_settings(flat, scratch / "c")


@pytest.mark.slow
def test_the_smoke_run_leaves_all_results_and_again_trains_nothing(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(cifar.command)
    run, out = tmp_path / "run", tmp_path / "out"
    typed = ["--smoke", "--run", str(run), "--out", str(out)]
    first = CliRunner().invoke(app, typed)
    assert first.exit_code == 0, first.output
    assert {file.name for file in out.iterdir()} == {
        "cifar.json", "cifar-config.toml", "cifar-metrics.json", "cifar-report.html", "cifar-grid.png",
    }  # fmt: skip
    results = json.loads((out / "cifar.json").read_text())
    assert tuple(results["seconds"]) == STAGES
    assert results["elapsed"] >= sum(results["seconds"].values()) - 0.1 * len(STAGES)
    assert results["set"] == "digits" and results["diffusion_steps"] == 4 and results["seconds_per_step"] > 0
    assert results["metrics"] == json.loads((run / "metrics.json").read_text())
    accuracies = json.loads(first.stdout.splitlines()[-1])
    assert accuracies == {method: results["metrics"][method]["top1"] for method in accuracies}
    assert {"ce", "diffult"} <= set(accuracies)

    trained = {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    again = CliRunner().invoke(app, typed)
    assert again.exit_code == 0, again.output
    assert trained and {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")} == trained
