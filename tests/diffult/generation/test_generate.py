"""Generation: exact counts, the same samples whatever the batch, damaged shards, refusals."""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._inductor.exc import InductorError

from diffult import generate as verb
from diffult.errors import UserError
from diffult.generate import command, fill, parse_classes, read_counts
from diffult.generation.export import FORMATS, export
from diffult.generation.generator import build_generator
from diffult.generation.shards import ShardStore
from diffult.generation.synthetic import kept_samples, open_store, read_quota
from diffult.runs.run_dir import RunDir
from ffcv_writers import Loader, open_set

CLASSES = tuple("0123456789")
QUOTAS = np.array([0, 3, 0, 5, 1, 0, 0, 0, 9, 4])


def draw(run: RunDir, folder: Path, batch_size: int, **settings):
    s = run.config.generate.model_copy(update={"batch_size": batch_size, "max_draws": 6.0, **settings})
    store = open_store(folder, run, s, QUOTAS, seed=3)
    quota = read_quota(store, s, QUOTAS)
    result = fill(build_generator(run, s, 3), store, quota, CLASSES)
    samples = kept_samples(store, quota)
    images = np.stack([samples.read(i) for i in range(len(samples))])
    return result, list(zip(samples.labels.tolist(), samples.indices.tolist(), strict=True)), images


@pytest.mark.parametrize(("sampler", "guidance"), [("dpm++", 0.0), ("ddpm", 1.0), ("ddim", 0.0)])
def test_the_same_samples_whatever_the_batch_size(tiny_run, tmp_path, sampler, guidance):
    settings = {"sampler": sampler, "guidance": guidance, "steps": 3}
    results = [draw(tiny_run, tmp_path / str(size), size, **settings) for size in (7, 64, 256)]
    first, names, images = results[0]
    assert [c for c, _ in names] == np.repeat(np.arange(10), QUOTAS).tolist()  # exact counts
    for other, other_names, other_images in results[1:]:
        assert other_names == names
        assert {k: other[k] for k in ("drawn", "id", "aid", "ood")} == {
            k: first[k] for k in ("drawn", "id", "aid", "ood")
        }
        assert np.abs(images.astype(int) - other_images).max() <= 1  # one grey level: rounding of convolutions


def test_bits_are_the_same_at_one_batch_shape(tiny_run):
    generator = build_generator(tiny_run, tiny_run.config.generate, 5)
    labels, indices = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]), torch.arange(8)
    turned = torch.arange(7, -1, -1)
    assert torch.equal(generator.draw(labels, indices)[turned], generator.draw(labels[turned], indices[turned]))


def test_damaged_shard_is_set_aside_and_drawn_again(tiny_run, tmp_path):
    _, names, images = draw(tiny_run, tmp_path / "s", 8)
    shard = sorted((tmp_path / "s").glob("shard-*"))[1]
    shard.write_bytes(shard.read_bytes()[:100])
    _, again, images_again = draw(tiny_run, tmp_path / "s", 8)
    assert again == names
    assert np.abs(images.astype(int) - images_again).max() <= 1
    assert shard.with_suffix(".damaged").exists()


def test_hopeless_class_warns_and_ends(tiny_run, tmp_path, caplog, monkeypatch):
    def all_out(self, images, labels):
        return torch.full((len(images),), 9.0), torch.full((len(images),), 2, dtype=torch.uint8)

    monkeypatch.setattr("diffult.generation.generator.Generator.judge", all_out)
    settings = tiny_run.config.generate.model_copy(update={"max_draws": 2.0})
    store = open_store(tmp_path, tiny_run, settings, QUOTAS, 0)
    quota = read_quota(store, settings, QUOTAS)
    result = fill(build_generator(tiny_run, settings, 0), store, quota, CLASSES)
    assert (result["drawn"], result["accepted"], result["ood"]) == (44, 0, 44)
    assert "class 3: only 0 of 5 samples after 10 candidates" in caplog.text


def test_samples_of_other_settings_are_refused(tmp_path):
    ShardStore(tmp_path, {"diffusion": "abc", "steps": 20})
    ShardStore(tmp_path, {"diffusion": "abc", "steps": 20})
    with pytest.raises(UserError, match=r"holds samples made otherwise \(steps: 20, now 10\)"):
        ShardStore(tmp_path, {"diffusion": "abc", "steps": 10})


def test_command_counts_and_output(tiny_run, tmp_path, capsys):
    command(run=tiny_run.path, fast=True, steps=2, per_class=2, classes="3,7-9", out=tmp_path / "out")
    printed = json.loads(capsys.readouterr().out)
    assert printed["accepted"] == 8 and printed["nfe"] == 2
    assert (tmp_path / "out" / "grid.png").exists()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["by_class"].keys() == {
        "3",
        "7",
        "8",
        "9",
    }


def test_compiled_on_request_it_draws_the_same(tiny_run, tmp_path, front_end_alone, caplog):
    kept = {}
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        with caplog.at_level("INFO"):
            command(run=tiny_run.path, fast=True, steps=2, per_class=2, classes="3,7", out=out, compile_=compiled)
        assert caplog.text.count("network compiled in") == compiled
        kept[compiled] = [file.read_bytes() for file in sorted(out.glob("shard-*"))]
    assert kept[True] == kept[False] != []


def test_without_a_compiler_compiling_ends_in_one_line(tiny_run, tmp_path, monkeypatch):
    def inductor(graph, inputs):
        raise InductorError(RuntimeError("No working C++ compiler found"), None)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: real(f, backend=inductor))
    torch._dynamo.reset()
    with pytest.raises(UserError, match=r"--compile: .*No working C\+\+ compiler found; it needs g\+\+"):
        command(run=tiny_run.path, fast=True, steps=2, per_class=1, out=tmp_path / "out", compile_=True)


def test_dry_run_writes_nothing_and_tells_time_and_disk(tiny_run, caplog, capsys):
    before = sorted(tiny_run.path.rglob("*"))
    with caplog.at_level("INFO"):
        command(run=tiny_run.path, fast=True, balance_to=100, dry_run=True)
    assert sorted(tiny_run.path.rglob("*")) == before
    assert f"{1000 - 201} samples, 10 evaluations each (dpm++, 10 steps)" in caplog.text
    told = capsys.readouterr().out
    assert told.startswith(f"{799 * 64 / 2**20:.1f} MiB of kept images; ")
    assert "drawn/s" in told and "TFLOP/s" in told and "if all pass" in told


def test_counts_come_from_a_file(tiny_run, tmp_path, capsys):
    (tmp_path / "counts.txt").write_text("3 2\n\n7 1\n")
    command(run=tiny_run.path, fast=True, steps=2, counts_file=tmp_path / "counts.txt", out=tmp_path / "out")
    assert json.loads(capsys.readouterr().out)["accepted"] == 3
    assert read_counts(tmp_path / "counts.txt", CLASSES).tolist() == [0, 0, 0, 2, 0, 0, 0, 1, 0, 0]
    named = tmp_path / "named.txt"
    named.write_text("polar bear 4\n")
    assert read_counts(named, ("seal", "polar bear")).tolist() == [0, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [("3", "line 1: expected a class and a count"), ("3 1\n10 2", "line 2: .*10 2"), ("3 1\n3 1", "named twice")],
)
def test_bad_counts_are_told_with_their_line(tmp_path, text, message):
    (tmp_path / "counts.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_counts(tmp_path / "counts.txt", CLASSES)


def test_three_processes_keep_what_one_keeps(tiny_run, tmp_path):
    """Same names, same verdicts, and at one batch size the same bits."""
    run = Path(shutil.copytree(tiny_run.path, tmp_path / "run"))
    options = ["--run", str(run), "--fast", "--steps", "2", "--per-class", "9", "--batch-size", "4"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "--"]
    results = []
    for name, start in (("one", []), ("three", torchrun)):
        arguments = [*start, "diffult.generate", *options, "--out", str(tmp_path / name)]
        out = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr[-2000:]
        store = ShardStore(tmp_path / name, json.loads((tmp_path / name / "manifest.json").read_text()))
        quota = read_quota(store, tiny_run.config.generate, np.full(10, 9))
        kept = kept_samples(store, quota)
        names = list(zip(kept.labels.tolist(), kept.indices.tolist(), strict=True))
        results.append((names, [quota.tally(c) for c in range(10)], np.stack([kept[i] for i in range(len(kept))])))
    assert {file.name[6:9] for file in (tmp_path / "three").glob("shard-*")} == {"000", "001", "002"}
    assert results[0][:2] == results[1][:2]
    assert np.array_equal(results[0][2], results[1][2])


def test_exports_hold_the_kept_samples(tiny_run, tmp_path):
    settings = tiny_run.config.generate.model_copy(update={"max_draws": 6.0})
    store = open_store(tmp_path, tiny_run, settings, QUOTAS, seed=3)
    quota = read_quota(store, settings, QUOTAS)
    fill(build_generator(tiny_run, settings, 3), store, quota, CLASSES)
    kept = kept_samples(store, quota)
    images, labels = np.stack([kept[i] for i in range(len(kept))])[..., 0], kept.labels.tolist()
    made = {name: export(kept, CLASSES, tmp_path, name) for name in FORMATS}

    files = sorted(made["imagefolder"].glob("*/*.png"))
    assert [int(file.parent.name) for file in files] == labels
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), images)
    with np.load(made["npz"]) as arrays:
        assert np.array_equal(arrays["images"][..., 0], images) and arrays["labels"].tolist() == labels
    with zipfile.ZipFile(made["zip"]) as archive:
        listed = json.loads(archive.read("dataset.json"))["labels"]
        assert [label for _, label in listed] == labels
        assert np.array_equal(np.asarray(Image.open(archive.open(listed[-1][0]))), images[-1])
    with tarfile.open(made["wds"]) as archive:
        members = archive.getmembers()
        assert [int(archive.extractfile(m).read()) for m in members[1::2]] == labels
        assert np.array_equal(np.asarray(Image.open(archive.extractfile(members[0]))), images[0])
    beton = open_set([made["beton"]])
    assert beton.labels.tolist() == labels and beton.synthetic.all()
    read = np.concatenate([batch.images.numpy() for batch in Loader(beton, 8).sequential()])
    assert np.array_equal(read[..., 0], images)


def test_parse_classes():
    assert parse_classes("3,7-9", 10) == [3, 7, 8, 9]
    for bad, message in (
        ("x", "expected numbers"),
        ("3-", "expected"),
        ("10", "no class 10"),
        ("5-3", "expected"),
    ):
        with pytest.raises(UserError, match=message):
            parse_classes(bad, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance_to": 3, "per_class": 4}, "exclude each other"),
        ({"sampler": "euler"}, "expected one of ddim, ddpm, dpm"),
        ({"steps": 2000}, "the model has 1000 timesteps"),
        ({"classes": "11"}, "no class 11"),
        ({"export_": "gif"}, "expected one of imagefolder, npz"),
    ],
)
def test_bad_options(tiny_run, options, message):
    with pytest.raises(UserError, match=message):
        command(run=tiny_run.path, **options)


def test_without_a_run_the_bundled_one_is_trained_first(tiny_run, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    commands = []

    def pretend(arguments, check):
        commands.append(arguments)
        shutil.copytree(tiny_run.path, tmp_path / "runs" / "digits-lt")
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(verb.subprocess, "run", pretend)
    with caplog.at_level("INFO"):
        command(fast=True, dry_run=True)  # says what would be drawn, and trains nothing for it
        assert commands == []
        with pytest.raises(UserError, match="no class 99"):
            command(fast=True, classes="99")
        assert commands == []
        for out in ("a", "b"):
            command(fast=True, per_class=1, classes="0", steps=2, out=tmp_path / out)
    assert "training the bundled digits-lt run first" in caplog.text
    expected = [
        "-m",
        "diffult.run",
        "--run",
        "runs/digits-lt",
        "--until",
        "diffusion",
        "--preset",
        "digits-lt",
    ]
    assert commands == [[sys.executable, *expected]]  # once: the second call finds it
