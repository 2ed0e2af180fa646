"""Checks of the diffusion model in training, through the stage: what they measure, and how they end it."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from sklearn.linear_model import Ridge

from diffult.config import load_preset
from diffult.engine import loop
from diffult.errors import UserError
from diffult.generation import checks
from diffult.generation.checks import ModelChecks, check_sizes
from diffult.generation.preview import preview_settings
from diffult.longtail.copies import copies_among
from diffult.longtail.linear_probe import probe_accuracy
from diffult.run import run_pipeline
from diffult.runs.files import load_state, load_tensors
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import affected, upstream
from diffult.train_diffusion import train_diffusion
from ffcv_writers import Loader, open_set, write

CHECKED = [
    *TINY, "diffusion.aid=false", "diffusion.cosine_decay=false", "diffusion.steps=12", "diffusion.check_every=2",
]  # fmt: skip
STOPPING = [*CHECKED, "diffusion.early_stopping=true", "diffusion.patience=2", "diffusion.max_copies=1"]


@pytest.fixture
def new(tiny_run, tmp_path):
    """A run before its diffusion stage, with settings of its own."""

    def new(name: str, settings: list[str]) -> RunDir:
        run = RunDir.open(tmp_path / name, "digits-lt", settings)
        for stage in ("pack", "extractor"):
            shutil.copytree(tiny_run.folder(stage), run.folder(stage))
        run.save_config()
        return run

    return new


@pytest.fixture
def improving_until(monkeypatch):
    """A tiny training improves for ever: with this the score gets worse after the check of a step."""

    def improving_until(step: int) -> None:
        def early_stopping(measure, config):
            stopping = checks.early_stopping(measure, config)
            judge = stopping.judge

            def worsening():
                judgement = judge()
                late = stopping.step + stopping.every > step  # it holds the step of the check before
                return replace(judgement, score=judgement.score + late * (10 + stopping.step))

            stopping.judge = worsening
            return stopping

        monkeypatch.setattr("diffult.train_diffusion.early_stopping", early_stopping)

    return improving_until


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_tensors(run.folder("diffusion") / "ema.safetensors")[0]


def lines(run: RunDir) -> list[dict]:
    return [json.loads(line) for line in (run.folder("diffusion") / "metrics.jsonl").read_text().splitlines()]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_probe_is_ridge_regression():
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 5))
    labels, held_out_labels = np.arange(30) % 3, np.array([0] * 20 + [1] * 5 + [2] * 5)
    x = centres[labels] + generator.normal(size=(30, 5))
    z = centres[held_out_labels] + generator.normal(size=(30, 5))
    ridge = Ridge(alpha=0.1 * 30).fit((x - x.mean(0)) / x.std(0), np.eye(3)[labels])
    right = ridge.predict((z - x.mean(0)) / x.std(0)).argmax(1) == held_out_labels
    expected = 100 * np.mean([right[held_out_labels == label].mean() for label in range(3)])
    assert 40 < expected < 100
    assert probe_accuracy(x, labels, z, held_out_labels, 3) == pytest.approx(expected)


@pytest.mark.parametrize("mirrored", [False, True])
def test_copies_are_nearer_than_the_threshold_to_an_image_of_their_class(tmp_path, mirrored):
    generator = np.random.default_rng(0)
    real, labels = generator.integers(0, 256, (9, 4, 4, 1), dtype=np.uint8), np.arange(9) % 2
    write(tmp_path / "x.beton", list(real), labels=labels, synthetic=0 * labels, index=np.arange(9))
    train = Loader(open_set([tmp_path / "x.beton"]), 2)
    near = np.clip(real[:6] + generator.normal(0, 25, (6, 4, 4, 1)), 0, 255).astype(np.uint8)
    near[3:] = near[3:, :, ::-1]
    own = np.array([0, 1, 1, 1, 0, 1])  # that of 2 is the other class
    thresholds = np.array([0.12, 0.08])

    def least(image: np.ndarray, label: int) -> float:
        turned = [image, image[:, ::-1]] if mirrored else [image]
        return min(np.sqrt((((x - r.astype(float)) / 255) ** 2).mean()) for x in turned for r in real[labels == label])

    expected = [least(image.astype(float), label) < thresholds[label] for image, label in zip(near, own, strict=True)]
    assert len(set(expected)) == 2
    assert copies_among(torch.from_numpy(near), own, train, thresholds, mirrored).tolist() == expected


def test_checks_are_logged_and_change_nothing(new):
    plain, run = new("plain", [*CHECKED, "diffusion.check_every=0"]), new("run", [*CHECKED, "diffusion.check_every=5"])
    train_diffusion(plain)
    train_diffusion(run)
    assert same(weights(plain), weights(run))
    found = {line["step"]: line for line in lines(run) if "held_out_loss" in line}
    assert list(found) == [5, 10, 12]  # at the last step too
    for line in found.values():
        assert line["train_loss"] > 0 and 0 <= line["cas"] <= 100 and 0 <= line["copies"] <= 100
    assert found[12]["held_out_loss"] < found[5]["held_out_loss"]
    assert "stopped" not in run.done("diffusion") and run.done("diffusion")["steps"] == 12


def test_it_stops_says_why_and_keeps_the_weights_of_the_best_check(new, improving_until, caplog):
    improving_until(4)
    run, short = new("run", STOPPING), new("short", [*STOPPING, "diffusion.steps=4", "diffusion.early_stopping=false"])
    with caplog.at_level(logging.INFO):
        train_diffusion(run)
    record = run.done("diffusion")
    assert (record["steps"], record["best_step"], record["images"]) == (8, 4, 64)
    assert record["stopped"] == "the held-out loss has not improved since step 4"
    assert (
        "ended at step 8: the held-out loss has not improved since step 4; the weights are those of step 4"
        in caplog.text
    )
    assert [line["step"] for line in lines(run)] == [2, 3, 4, 6, 8]
    train_diffusion(short)  # the rate is constant, so that the first four steps are the same
    assert same(weights(run), weights(short))


@pytest.mark.parametrize("killed_at", [4, 7])
def test_killed_and_taken_up_it_ends_with_the_same_weights(new, improving_until, monkeypatch, killed_at):
    improving_until(4)
    unbroken, run = new("unbroken", STOPPING), new("run", STOPPING)
    train_diffusion(unbroken)

    def seed_step(*key):
        if key[-1] == killed_at:
            raise KeyboardInterrupt
        seeds(*key)

    seeds = loop.seed_step
    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr(loop, "seed_step", seed_step)
        train_diffusion(run)
    assert load_state(run.folder("diffusion") / "state.pt")["step"] == killed_at // 3 * 3
    train_diffusion(run)
    assert same(weights(unbroken), weights(run))
    kept = [{k: v for k, v in run.done("diffusion").items() if k != "seconds"} for run in (unbroken, run)]
    assert kept[0] == kept[1]
    for a, b in zip(lines(unbroken), lines(run), strict=True):
        a, b = ({k: v for k, v in line.items() if "_s" not in k and k != "data_wait"} for line in (a, b))
        assert a == b


def test_too_many_copies_end_it(new, monkeypatch):
    monkeypatch.setattr(checks, "copies_among", lambda images, labels, *_: labels < 6)
    run = new("run", [*STOPPING, "diffusion.max_copies=0.55"])
    train_diffusion(run)
    record = run.done("diffusion")
    assert record["stopped"] == "60 % of the samples are copies of training images, above diffusion.max_copies"
    assert (record["steps"], record["best_step"]) == (2, 2)


@pytest.fixture
def with_validation(monkeypatch, tmp_path):
    """Lets runs read other validation images: those of their own for which `chosen(labels)` is true."""
    packed = RunDir.packed

    def with_validation(chosen) -> None:
        def packed_again(run):
            found = packed(run)
            kept, file = np.flatnonzero(chosen(found.val.labels)), tmp_path / "val.beton"
            images = [b for batch in Loader(found.val, 8).batches(kept) for b in batch.images.numpy()]
            write(file, images, labels=found.val.labels[kept], synthetic=0 * kept, index=np.arange(len(kept)))
            return replace(found, val=open_set([file]))

        monkeypatch.setattr(RunDir, "packed", packed_again)

    return with_validation


def test_classes_without_validation_images_do_not_count(new, with_validation):
    with_validation(lambda labels: ~np.isin(labels, [3, 9]))
    run = new("run", STOPPING)
    train_diffusion(run)
    assert run.done("diffusion")["steps"] == 12
    for line in lines(run):
        if "held_out_loss" in line:
            assert all(np.isfinite(line[name]) for name in ("held_out_loss", "train_loss", "cas", "copies"))
            assert line["held_out_loss"] == pytest.approx(line["train_loss"], rel=0.2)  # the same questions


@pytest.mark.parametrize(("known", "share"), [(range(2, 10), 75.0), ((), None)])
def test_copies_are_counted_in_the_classes_whose_threshold_is_known(new, monkeypatch, caplog, known, share):
    def measured(*args):
        found = measure_copies(*args)
        found["threshold"][[label for label in range(10) if label not in known]] = np.nan
        return found

    measure_copies = checks.measure_copies
    monkeypatch.setattr(checks, "measure_copies", measured)
    monkeypatch.setattr(checks, "copies_among", lambda images, labels, *_: labels >= 4)
    run = new("run", [*STOPPING, "diffusion.max_copies=0.7"])
    train_diffusion(run)
    warnings = [record.getMessage() for record in caplog.records if "data.val_per_class" in record.getMessage()]
    assert len(warnings) == 1
    if share is None:
        assert "copies in 10 of 10 classes are not counted, so diffusion.max_copies has no effect" in warnings[0]
        assert run.done("diffusion")["steps"] == 12 and not any("copies" in line for line in lines(run))
    else:
        assert "copies in 2 of 10 classes are not counted, so diffusion.max_copies is about the others" in warnings[0]
        assert run.done("diffusion")["steps"] == 2 and lines(run)[-1]["copies"] == share


def test_check_samples_are_not_those_of_the_run(new, monkeypatch):
    """A change of how the run draws redoes no training, so checks do not draw that way; nor what it will keep."""
    seen = []

    def measured(self):
        seen.append((self.sampler.settings, self.sampler.seed))
        return call(self)

    call = ModelChecks.__call__
    monkeypatch.setattr(ModelChecks, "__call__", measured)
    run = new("run", [*STOPPING, "generate.sampler=ddim", "generate.steps=3"])
    train_diffusion(run)
    settings, seed = seen[0]
    assert settings == preview_settings(run.config.diffusion.timesteps) and seed != run.config.seed


def test_checks_can_be_added_to_a_training_under_way(new, monkeypatch):
    plain = ["diffusion.check_every=0", "diffusion.on_divergence=stop"]
    run, seeds = new("run", [*CHECKED, *plain]), loop.seed_step

    def seed_step(*key):
        if key[-1] == 7:
            raise KeyboardInterrupt
        seeds(*key)

    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr(loop, "seed_step", seed_step)
        train_diffusion(run)
    added = ["diffusion.check_every=4", "diffusion.on_divergence=go_back"]
    train_diffusion(RunDir.open(run.path, overrides=added))
    assert [line["step"] for line in lines(run) if "held_out_loss" in line] == [8, 12]


def test_without_validation_images_it_trains_to_the_ceiling(tmp_path, caplog):
    run = RunDir.open(tmp_path / "run", "digits-lt", [*STOPPING, "data.val_per_class=0"])
    run_pipeline(run, "extractor")
    train_diffusion(run)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [
        w for w in warnings if "no validation images to check the model with, so it trains all of its 12 steps" in w
    ]
    assert run.done("diffusion")["steps"] == 12 and not any("held_out_loss" in line for line in lines(run))


def test_two_processes_stop_as_one(tmp_path):
    """At a rate of nothing no score improves on the first, so that training ends after `patience` further checks."""
    settings = [*STOPPING, "precision=float32", "diffusion.learning_rate=1e-30"]
    one, two = (RunDir.open(tmp_path / name, "digits-lt", settings) for name in ("one", "two"))
    run_pipeline(one, "diffusion")
    run_pipeline(two, "extractor")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    command += ["diffult.train_diffusion", "--run", str(two.path)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    for run in (one, two):
        assert [run.done("diffusion")[name] for name in ("steps", "best_step")] == [6, 2]
    names = ("held_out_loss", "train_loss", "cas", "copies")
    for a, b in zip(lines(one), lines(two), strict=True):
        assert {name: b[name] for name in names if name in b} == pytest.approx({n: a[n] for n in names if n in a})


def test_how_much_is_measured_follows_from_the_interval():
    def evaluations(*settings: str) -> float:
        config = load_preset("fashion-mnist-lt", ["diffusion.batch_size=128", *settings])
        items, samples = check_sizes(config, 10)
        return 10 * (2 * items + 10 * samples)  # ten steps draw one

    for every in (200, 500, 1000):
        training = 3 * every * 128
        assert 0.03 * training < evaluations(f"diffusion.check_every={every}") <= checks.CHECK_SHARE * training
    assert evaluations("diffusion.check_every=1") == 10 * (2 * 1 + 10)  # an image of each class
    assert evaluations("diffusion.check_every=100_000") < 3e4  # beyond, more would say no more
    often = "diffusion.check_every=1000"
    assert evaluations(often) == evaluations(often, "generate.steps=500", "generate.sampler=ddpm")


def test_what_the_stage_reads_with_checks(new):
    plain = load_preset("digits-lt")
    checks_alone = ["diffusion.check_every=50", "diffusion.patience=2", "diffusion.max_copies=0.5"]
    checked = load_preset("digits-lt", checks_alone)
    stopping = load_preset("digits-lt", [*checks_alone, "diffusion.early_stopping=true"])
    assert upstream(plain, "diffusion") == upstream(checked, "diffusion") == ("pack",)
    assert checked.diffusion.uses_extractor and affected(plain, checked) == []  # they change no weight
    assert upstream(stopping, "diffusion") == ("pack", "extractor")
    assert affected(plain, stopping)[0] == "diffusion"
    for setting in ("check_every=60", "patience=3", "max_copies=0.4"):
        other = load_preset("digits-lt", [*checks_alone, "diffusion.early_stopping=true", f"diffusion.{setting}"])
        assert affected(stopping, other)[0] == "diffusion"
    with pytest.raises(UserError, match="early_stopping needs check_every, such as a twentieth of the steps"):
        load_preset("digits-lt", ["diffusion.early_stopping=true"])

    def hashes(run: RunDir) -> list[str]:
        return [run.hash(stage) for stage in ("extractor", "diffusion", "generate", "classifier")]

    for name, settings, reread in (("a", STOPPING, [False, True, True, True]), ("b", CHECKED, 4 * [False])):
        run = new(name, settings)
        before, file = hashes(run), run.folder("pack") / "done.json"
        record = json.loads(file.read_text())
        record["held_out"]["val"] = "of other images"
        file.write_text(json.dumps(record))
        assert [a != b for a, b in zip(before, hashes(run), strict=True)] == reread
