"""The whole pipeline at a tiny size: what it leaves, that it survives being killed, and that bad input is refused."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from diffult.engine.distributed import World
from diffult.errors import UserError
from diffult.evaluate import evaluate
from diffult.models.resnet import load_classifier
from diffult.models.unet import load_unet
from diffult.run import run_pipeline
from diffult.runs.run_dir import RunDir
from diffult.train_classifier import train_classifier
from ffcv_writers import open_set

# Runs the pipeline in children that each die by SIGKILL just before a rename, the 2nd, 3rd, ... 6th in turn: some files
# are whole, the next is there under its temporary name only. (Always the 2nd would never end: a stage writes up to four
# files without looking back.) The parent imports everything once and never starts a thread before it forks.
KILLER = """
import os, signal, sys
import ffcv_writers
from pathlib import Path
import diffult.run
from diffult.runs.run_dir import RunDir

def child(fatal):
    renames, replace = 0, os.replace
    def dying_replace(a, b):
        nonlocal renames
        renames += 1
        if renames == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(a, b)
    os.replace = dying_replace
    diffult.run.run_pipeline(RunDir.open(Path(sys.argv[1]), "digits-lt", sys.argv[2:]))

for deaths in range(100):
    pid = os.fork()
    if pid == 0:
        try:
            child(2 + deaths % 5)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status):
        print(deaths)
        sys.exit(os.WEXITSTATUS(status))
"""


def comparable(path: Path) -> dict:
    metrics = json.loads((path / "metrics.json").read_text())
    del metrics["seconds"], metrics["generation"]["images_per_s"]
    return metrics


def test_metrics_hold_what_the_contract_says(tiny_run):
    metrics = json.loads((tiny_run.path / "metrics.json").read_text())
    for method in ("ce", "diffult"):
        assert set(metrics[method]) == {"top1", "many", "medium", "few", "by_class"}
        assert all(0 <= metrics[method][name] <= 100 for name in ("top1", "many", "medium", "few"))
    generation = metrics["generation"]
    assert generation["drawn"] == generation["id"] + generation["aid"] + generation["ood"]
    assert generation["accepted"] == generation["id"] + generation["aid"]
    assert generation["nfe"] == 2
    assert (tiny_run.path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("file", ["extractor/weights", "extractor/statistics", "diffusion/ema"])
def test_weights_carry_the_hash_of_their_settings(tiny_run, file):
    with safe_open(tiny_run.path / f"{file}.safetensors", framework="pt") as opened:
        assert opened.metadata()["hash"] == tiny_run.hash(file.partition("/")[0])


def test_weights_open_again(tiny_run):
    x = torch.zeros(2, 1, 8, 8)
    assert load_classifier(tiny_run.folder("classifier") / "diffult.safetensors", torch.device("cpu"))(x).shape == (
        2,
        10,
    )
    unet = load_unet(tiny_run.folder("diffusion") / "ema.safetensors", torch.device("cpu"))
    assert unet(x, torch.zeros(2, dtype=torch.int64), torch.tensor([0, 10])).shape == x.shape


def test_a_finished_run_is_skipped(tiny_run):
    before = {file: file.stat().st_mtime_ns for file in tiny_run.path.rglob("*") if file.name != "report.html"}
    run_pipeline(RunDir.open(tiny_run.path, "digits-lt", TINY))
    changed = [f for f, t in before.items() if f.is_file() and f.stat().st_mtime_ns != t]
    assert changed == []


@pytest.mark.timeout(280)
def test_killed_at_every_file_it_writes_it_ends_with_the_same_metrics(tiny_run, tmp_path):
    run = tmp_path / "killed"
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(run), *TINY], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[-1]) > 8  # deaths: it was really killed in every stage
    assert comparable(run) == comparable(tiny_run.path)


@pytest.fixture
def copied_run(tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_run.path, tmp_path / "copy"))


@pytest.fixture
def unfinished(copied_run) -> RunDir:
    for file in copied_run.rglob("done.json"):
        file.unlink()
    return RunDir.open(copied_run)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_truncated_checkpoints_are_refused_before_any_work(unfinished):
    for file in (unfinished.folder("diffusion") / name for name in ("state.pt", "state.previous.pt")):
        truncate(file)
    with pytest.raises(UserError, match=r"diffusion/state.pt: damaged checkpoint .*delete it"):
        run_pipeline(unfinished)
    assert unfinished.done("extractor") is None


def test_a_truncated_checkpoint_loses_steps_alone(unfinished, tiny_run, caplog):
    truncate(unfinished.folder("diffusion") / "state.pt")
    run_pipeline(unfinished)
    assert "diffusion/state.pt: damaged checkpoint, set aside as state.pt.damaged; going on from" in caplog.text
    assert comparable(unfinished.path) == comparable(tiny_run.path)
    assert not list(unfinished.path.rglob(".*.tmp"))


def test_truncated_weights_are_named(copied_run):
    weights = copied_run / "diffusion" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"ema.safetensors: damaged"):
        load_unet(weights, torch.device("cpu"))


def test_a_refused_command_leaves_nothing_and_can_be_corrected(tmp_path):
    settings = ["data.source=folder", f"data.path={tmp_path / 'images'}", "data.profile=natural"]
    with pytest.raises(UserError, match="images"):
        run_pipeline(RunDir.open(tmp_path / "run", "cifar10-lt-100", settings))
    assert not (tmp_path / "run").exists()


def test_an_image_that_does_not_decode_is_named_before_any_work(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(
                    folder / f"{i}.png"
                )
    bad = tmp_path / "images" / "train" / "dog" / "2.png"
    bad.write_bytes(bad.read_bytes()[:-900])
    settings = ["data.source=folder", f"data.path={tmp_path / 'images'}", "data.profile=natural", "unet.channels=8"]
    with pytest.raises(UserError, match=r"train/dog/2.png\) could not be read: .*; repair or remove") as caught:
        run_pipeline(RunDir.open(tmp_path / "run", "cifar10-lt-100", settings))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").rglob("*.beton"))


@pytest.mark.parametrize(
    "file", ["pack/train.beton", "diffusion/ema.safetensors", "generate/synthetic.beton", "classifier/ce.safetensors"]
)
def test_a_deleted_file_is_made_again(copied_run, tiny_run, file):
    """As the error for a damaged file advises: delete it and type the same command again."""
    (copied_run / file).unlink()
    (copied_run / "metrics.json").unlink()
    run_pipeline(RunDir.open(copied_run))
    assert (copied_run / file).exists()
    assert comparable(copied_run) == comparable(tiny_run.path)


def test_each_classifier_is_logged_as_its_training_begins(copied_run, caplog):
    for file in ("diffult.safetensors", "diffult.state.pt"):
        (copied_run / "classifier" / file).unlink(missing_ok=True)
    with caplog.at_level("INFO"):
        train_classifier(RunDir.open(copied_run))
    assert "classifier 2 of 2: diffult: 8 steps" in caplog.messages
    assert "1 of 2" not in caplog.text  # which was whole


def test_damaged_samples_are_named_and_drawn_again(copied_run, tiny_run):
    samples = copied_run / "generate" / "synthetic.beton"
    samples.write_bytes(samples.read_bytes()[:99])
    for file in ("classifier/done.json", "classifier/diffult.safetensors", "metrics.json"):
        (copied_run / file).unlink()
    with pytest.raises(UserError, match=r"generate/synthetic.beton is damaged .*delete it and run the stage"):
        run_pipeline(RunDir.open(copied_run))
    samples.unlink()
    run_pipeline(RunDir.open(copied_run))
    assert comparable(copied_run) == comparable(tiny_run.path)


def test_killed_before_its_first_file_it_starts_again(tmp_path):
    (tmp_path / ".config.toml.1.tmp").write_text("")
    RunDir.open(tmp_path, "digits-lt").save_config()
    assert RunDir.open(tmp_path).config.name == "digits-lt"


def test_a_config_edited_by_hand_redoes_what_reads_it(copied_run):
    file = copied_run / "config.toml"
    file.write_text(file.read_text().replace("label_dropout = 0.1", "label_dropout = 0.2"))
    run = RunDir.open(copied_run)
    assert [stage for stage in ("pack", "extractor", "diffusion", "generate") if run.done(stage)] == [
        "pack",
        "extractor",
    ]
    with pytest.raises(UserError, match="stage 'diffusion' is not finished with the present settings"):
        run.require("diffusion")


def test_stages_run_alone_in_order_or_say_which_is_missing(tmp_path):
    run = RunDir.open(tmp_path / "new", "digits-lt", TINY)
    run.save_config()
    for module, missing in (
        ("train_extractor", "pack"),
        ("generate", "pack"),
        ("train_classifier", "pack"),
        ("evaluate", "classifier"),
    ):
        out = subprocess.run(
            [sys.executable, "-m", f"diffult.{module}", "--run", str(run.path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert out.returncode == 2
        last = out.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and f"stage {missing!r} is not finished" in last, out.stderr


@pytest.mark.parametrize(
    ("preset", "methods", "evaluations"),
    [("cifar10-lt-100", 6, 6), ("cifar10-lt-100-fast", 6, 3)],  # guidance doubles the three steps
)
def test_cifar_presets_run_on_an_image_folder_and_resume(shared_data, tmp_path, preset, methods, evaluations):
    """With their losses, samplers and methods, at a small width and a few steps, on real images."""
    folder = tmp_path / "cifar"
    with tarfile.open(shared_data / "cifar10-jpeg.tar.gz") as tar:
        for member in tar:
            number = int(Path(member.name).stem) if member.name.endswith(".jpg") else 0
            split = member.name.removeprefix("./").split("/")[0]
            if member.isfile() and 1 <= number % 5000 <= (20 if split == "train" else 4):
                tar.extract(member, folder, filter="data")
    settings = [
        "data.source=folder", f"data.path={folder}", "data.imbalance=5", "data.n_max=15", "data.val_per_class=2",
        "extractor.steps=3", "extractor.batch_size=16", "unet.channels=8", "diffusion.steps=4",
        "diffusion.batch_size=4", "diffusion.checkpoint_every=2", "generate.balance_to=5", "generate.steps=3",
        "generate.batch_size=8", "classifier.steps=3", "classifier.batch_size=16",
    ]  # fmt: skip
    path = tmp_path / "run"
    run_pipeline(RunDir.open(path, preset, settings), "diffusion")
    (path / "diffusion" / "done.json").unlink()  # as if killed after its last checkpoint
    run_pipeline(RunDir.open(path))
    metrics = json.loads((path / "metrics.json").read_text())
    assert len([m for m in metrics if isinstance(metrics[m], dict) and "top1" in metrics[m]]) == methods
    assert metrics["generation"]["nfe"] == evaluations


@pytest.mark.parametrize("stage", ["extractor", "diffusion", "classifier"])
def test_a_batch_that_the_processes_cannot_share_is_refused_before_packing(tmp_path, stage):
    sizes = dict.fromkeys(("extractor", "diffusion", "classifier"), 30) | {stage: 32}
    run = RunDir.open(tmp_path / "run", "digits-lt", [f"{name}.batch_size={size}" for name, size in sizes.items()])
    with pytest.raises(UserError, match=rf"{stage}\.batch_size = 32 cannot be shared by 3 processes"):
        run_pipeline(run, world=World(0, 3))
    assert not (tmp_path / "run" / "pack").exists()


def test_a_batch_of_a_finished_training_may_have_any_size(copied_run):
    """As those who only draw with other numbers of processes need it: the refusal is of the one that is to do."""
    (copied_run / "classifier" / "done.json").unlink()
    with pytest.raises(UserError, match=r"classifier\.batch_size = \d+ cannot be shared by 1009 processes"):
        run_pipeline(RunDir.open(copied_run), world=World(0, 1009))


def test_evaluate_keeps_its_predictions_and_measures_copies_once(copied_run):
    run, folder = RunDir.open(copied_run), copied_run / "evaluate"
    metrics = json.loads((copied_run / "metrics.json").read_text())
    predictions = load_file(folder / "predictions.safetensors")
    labels = predictions.pop("labels").numpy()
    assert set(predictions) == {"ce", "diffult"}
    for method, predicted in predictions.items():
        right = predicted.numpy() == labels
        assert metrics[method]["top1"] == pytest.approx(100 * right.mean())
        assert metrics[method]["by_class"] == pytest.approx([100 * right[labels == c].mean() for c in range(10)])
    copies = load_file(folder / "copies.safetensors")
    packed, kept = run.packed(), open_set([copied_run / "generate" / "synthetic.beton"])
    train = packed.train.take(copies["nearest"].numpy()) / 255
    rms = np.sqrt(np.mean((kept.take(np.arange(len(kept))) / 255 - train) ** 2, axis=(1, 2, 3)))
    assert copies["pixels"].numpy() == pytest.approx(rms, abs=1e-6)
    assert (packed.train.labels[copies["nearest"].numpy()] == kept.labels).all()
    assert copies["held_out_labels"].tolist() == packed.val.labels.tolist()
    assert metrics["copies"]["share"] == pytest.approx(100 * copies["copy"].numpy().mean())
    assert metrics["validation_images"] == len(packed.val)

    measured = (folder / "copies.safetensors").stat().st_mtime_ns
    (folder / "predictions.safetensors").unlink()
    assert evaluate(run) == metrics
    assert (folder / "predictions.safetensors").exists()
    assert (folder / "copies.safetensors").stat().st_mtime_ns == measured
