"""Generation: exact counts, the same samples whatever the batch, damaged shards, refusals."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._inductor.exc import InductorError

from diffult import generate as verb
from diffult.data.class_names import ClassNames, read_counts
from diffult.engine.device import pick_device
from diffult.errors import UserError
from diffult.generate import command, open_sampler, open_store
from diffult.generation import shards
from diffult.generation.candidates import CandidateBatch
from diffult.generation.fill import fill
from diffult.generation.sampler import Sampler
from diffult.generation.shards import ShardStore, open_kept
from diffult.longtail.extractor import Extractor, load_extractor
from diffult.longtail.filter import Filter
from diffult.longtail.quota import Quota
from diffult.runs import sampler as runs_sampler
from diffult.runs.files import load_tensors, lock_folder
from diffult.runs.run_dir import RunDir
from diffult.runs.sampler import LEVELS

CLASSES = tuple("0123456789")
QUOTAS = np.array([0, 3, 0, 5, 1, 0, 0, 0, 9, 4])


def extractor_of(run: RunDir) -> Extractor:
    return load_extractor(run.folder("extractor"), pick_device())


def fill_folder(run: RunDir, folder: Path, batch_size: int, **settings):
    s = run.config.generate.model_copy(update={"batch_size": batch_size, "max_draws": 6.0, **settings})
    store, quota = open_store(folder, run, s, QUOTAS, seed=3), Quota(QUOTAS, s.max_draws)
    store.resume(quota)
    return fill(open_sampler(run, s, 3), extractor_of(run), store, quota, CLASSES)


def draw(run: RunDir, folder: Path, batch_size: int, **settings):
    return fill_folder(run, folder, batch_size, **settings), *kept(folder)


def kept(folder: Path) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Names and images of what is kept."""
    samples = open_kept(folder)
    names = list(zip(samples.labels.tolist(), samples.index.tolist(), strict=True))
    return names, samples.take(np.arange(len(samples)))


@pytest.mark.parametrize(("sampler", "guidance"), [("dpm++", 0.0), ("dpm++sde", 0.0), ("ddpm", 1.0), ("ddim", 0.0)])
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
    sampler = open_sampler(tiny_run, tiny_run.config.generate, 5)
    labels, indices = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]), torch.arange(8)
    turned = torch.arange(7, -1, -1)
    assert torch.equal(sampler.draw(labels, indices)[turned], sampler.draw(labels[turned], indices[turned]))


def test_damaged_shard_is_set_aside_and_drawn_again(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 0)
    _, names, images = draw(tiny_run, tmp_path / "whole", 8)
    with monkeypatch.context() as patch:
        patch.setattr(ShardStore, "finish", lambda *_: None)
        fill_folder(tiny_run, tmp_path / "s", 8)
    shard = sorted((tmp_path / "s").glob("shard-*"))[1]
    shard.write_bytes(shard.read_bytes()[:100])
    _, again, images_again = draw(tiny_run, tmp_path / "s", 8)
    assert again == names
    assert np.abs(images.astype(int) - images_again).max() <= 1
    assert shard.with_suffix(".damaged").exists()


def test_a_finished_folder_holds_the_kept_samples_and_every_candidate(tiny_run, tmp_path):
    result, names, _ = draw(tiny_run, tmp_path, 8)
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"manifest.json", "synthetic.beton", "candidates.safetensors"}
    table, _ = load_tensors(tmp_path / "candidates.safetensors")
    candidates = list(zip(table["labels"].tolist(), table["indices"].tolist(), strict=True))
    assert candidates == sorted(set(candidates)) and len(candidates) >= result["drawn"]
    radii = extractor_of(tiny_run).statistics.radii[table["labels"]]
    within = (table["distance"] > radii).long() + (table["distance"] > 2 * radii).long()
    assert table["verdict"].tolist() == within.tolist()
    passing = [name for name, verdict in zip(candidates, within.tolist(), strict=True) if verdict < 2]
    assert names == [name for c in range(10) for name in [p for p in passing if p[0] == c][: QUOTAS[c]]]
    assert open_kept(tmp_path).synthetic.all()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert draw(tiny_run, tmp_path, 8)[0] == result | {"images_per_s": None}
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


def test_small_batches_share_a_shard_and_old_ones_do_not_wait(tmp_path, monkeypatch):
    now, numbers = 100.0, itertools.count()
    monkeypatch.setattr(shards.time, "monotonic", lambda: now)
    monkeypatch.setattr(shards, "SHARD_BYTES", 5 * 2 * 64)
    store = ShardStore(tmp_path, {})

    def add(batches: int) -> list[int]:
        """Batches of four candidates of which two passed, 64 bytes an image; returns the candidates in each shard."""
        for _ in range(batches):
            names = np.arange(4) + 4 * next(numbers)
            images = names[::2, None, None, None] * np.ones((1, 8, 8, 1))
            passed = np.array([True, False, True, False])
            verdict = np.where(passed, 0, 2).astype(np.uint8)
            store.add(CandidateBatch(0 * names, names, 0.5 * names, verdict, passed, images.astype(np.uint8)))
        return [len(shard.labels) for _, shard in store.shards()]

    assert add(4) == []
    assert add(3) == [20]  # by size
    now += shards.SHARD_SECONDS
    assert add(1) == [20, 12]  # by age
    now = 100.0 + 200 * shards.SHARD_SECONDS  # half an hour on
    assert add(1) == [20, 12, 4]
    now += 1.9 * shards.SHARD_SECONDS
    assert add(1) == [20, 12, 4]  # a share of the time so far
    now += 0.2 * shards.SHARD_SECONDS
    assert add(1) == [20, 12, 4, 8]
    store.flush()
    assert add(0) == [20, 12, 4, 8]
    for _, shard in store.shards():
        assert np.array_equal(shard.images[:, 0, 0, 0], shard.indices[shard.passed])
        assert np.array_equal(shard.distance, 0.5 * shard.indices)


def test_where_no_sample_is_kept_there_is_no_file_and_nothing_to_export(tiny_run, tmp_path, caplog, monkeypatch):
    def all_out(self, extractor, images, labels):
        return torch.full((len(images),), 9.0), torch.full((len(images),), 2, dtype=torch.uint8)

    monkeypatch.setattr(Filter, "judge", all_out)
    options = {"run": tiny_run.path, "fast": True, "steps": 1, "per_class": 1, "classes": "3", "out": tmp_path / "out"}
    for _ in range(2):
        with caplog.at_level("INFO"):
            command(**options, export_=["zip"])
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {".lock", "manifest.json", "candidates.safetensors", "summary.json", "grid.png"}
    assert caplog.text.count("no sample was kept") == 2


def test_a_folder_that_another_process_writes_to_is_refused(tiny_run, tmp_path):
    with lock_folder(tmp_path / "out"), pytest.raises(UserError, match=r"out: another process writes to it; wait"):
        command(run=tiny_run.path, fast=True, steps=1, per_class=1, out=tmp_path / "out")


def test_hopeless_class_warns_and_ends(tiny_run, tmp_path, caplog, monkeypatch):
    def all_out(self, extractor, images, labels):
        return torch.full((len(images),), 9.0), torch.full((len(images),), 2, dtype=torch.uint8)

    monkeypatch.setattr(Filter, "judge", all_out)
    settings = tiny_run.config.generate.model_copy(update={"max_draws": 2.0})
    store = open_store(tmp_path, tiny_run, settings, QUOTAS, 0)
    extractor = extractor_of(tiny_run)
    result = fill(open_sampler(tiny_run, settings, 0), extractor, store, Quota(QUOTAS, 2.0), CLASSES)
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


def test_compiled_on_request_or_where_it_pays_it_draws_the_same(
    tiny_run, tmp_path, monkeypatch, front_end_alone, caplog
):
    monkeypatch.setattr(runs_sampler, "which", lambda name: name)
    bits = []
    for number, (asked, seconds, compiles) in enumerate([(False, 1e9, 0), (True, 0, 1), (None, 1e9, 1), (None, 9, 0)]):
        monkeypatch.setattr(Sampler, "seconds", lambda sampler, samples, each=seconds: each * samples / 4)
        out = tmp_path / str(number)
        caplog.clear()
        with caplog.at_level("INFO"):
            command(run=tiny_run.path, fast=True, steps=2, per_class=2, classes="3,7", out=out, compile_=asked)
        assert caplog.text.count("network compiled in") == compiles
        assert ("the network is compiled first" in caplog.text) == (asked is None and compiles)
        bits.append(kept(out)[1])
    assert all(np.array_equal(bits[0], other) for other in bits)


def test_the_time_of_a_draw_is_that_of_its_evaluations(tiny_run, monkeypatch):
    sampler = open_sampler(tiny_run, tiny_run.config.generate.model_copy(update={"steps": 100}), 5)
    evaluated = []
    monkeypatch.setattr(sampler, "_evaluate", lambda x, t, labels: evaluated.append(len(x)))
    monkeypatch.setattr("time.perf_counter", lambda: 3.0 * len(evaluated))
    assert sampler.seconds(20) == pytest.approx(3.0 * 100 * 20 / 8)  # batches of 8
    assert evaluated == [8, 8]


def test_without_a_compiler_compiling_ends_in_one_line(tiny_run, tmp_path, monkeypatch):
    def inductor(graph, inputs):
        raise InductorError(RuntimeError("No working C++ compiler found"), None)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: real(f, backend=inductor))
    torch._dynamo.reset()
    with pytest.raises(UserError, match=r"--compile: .*No working C\+\+ compiler found; it needs g\+\+"):
        command(run=tiny_run.path, fast=True, steps=2, per_class=1, out=tmp_path / "out", compile_=True)


def test_other_steps_than_the_run_lists_are_spaced(tiny_run):
    listed = ["generate.steps=2", "generate.timesteps=[900, 300]"]
    run = RunDir.open(tiny_run.path, overrides=listed)
    nothing = dict.fromkeys(("sampler", "steps", "guidance", "batch_size"))
    assert verb._settings(run, False, nothing).timesteps == (900, 300)
    assert verb._settings(run, False, nothing | {"steps": 3}).timesteps == ()
    assert verb._settings(run, True, nothing).timesteps == ()


def test_dry_run_writes_nothing_and_tells_time_and_disk(tiny_run, caplog, capsys):
    before = sorted(tiny_run.path.rglob("*"))
    with caplog.at_level("INFO"):
        command(run=tiny_run.path, fast=True, balance_to=100, dry_run=True)
    assert sorted(tiny_run.path.rglob("*")) == before
    assert f"{1000 - 201} samples, 5 evaluations each (dpm++, 5 steps)" in caplog.text
    told = capsys.readouterr().out
    assert told.startswith(f"{799 * 64 / 2**20:.1f} MiB of kept images; ")
    assert "drawn/s" in told and "TFLOP/s" in told and "if all pass" in told


def test_counts_come_from_a_file(tiny_run, tmp_path, capsys):
    (tmp_path / "counts.txt").write_text("3 2\n\n7 1\n")
    command(run=tiny_run.path, fast=True, steps=2, counts_file=tmp_path / "counts.txt", out=tmp_path / "out")
    assert json.loads(capsys.readouterr().out)["accepted"] == 3
    assert read_counts(tmp_path / "counts.txt", ClassNames(CLASSES)).tolist() == [0, 0, 0, 2, 0, 0, 0, 1, 0, 0]


def test_a_setting_changed_here_redoes_the_stage(tiny_run, tmp_path, capsys):
    run = RunDir.open(Path(shutil.copytree(tiny_run.path, tmp_path / "run")))
    command(run=run.path, set_=["generate.steps=1"])
    assert json.loads(capsys.readouterr().out)["nfe"] == 1
    changed = RunDir.open(run.path)
    assert changed.config.generate.steps == 1 and changed.done("generate") and not run.done("generate")
    assert not (run.path / "generated").exists()


def test_three_processes_keep_what_one_keeps(tiny_run, tmp_path):
    """Same names, same verdicts, and at one batch size the same bits."""
    run = Path(shutil.copytree(tiny_run.path, tmp_path / "run"))
    options = ["--run", str(run), "--fast", "--steps", "2", "--per-class", "9", "--batch-size", "4"]
    options += ["--set", "generate.match_histogram=true"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "--"]
    results = []
    for name, start in (("one", []), ("three", torchrun)):
        arguments = [*start, "diffult.generate", *options, "--out", str(tmp_path / name)]
        out = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr[-2000:]
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        results.append(
            (summary["by_class"], *kept(tmp_path / name), load_tensors(tmp_path / name / LEVELS)[0]["levels"])
        )
        assert not list((tmp_path / name).glob("shard-*"))
    assert results[0][:2] == results[1][:2]
    assert np.array_equal(results[0][2], results[1][2]) and torch.equal(results[0][3], results[1][3])


def test_a_sample_is_found_in_the_shards_of_every_process(tmp_path):
    quota, stores = Quota(np.array([9]), 1.0), [ShardStore(tmp_path, {}, rank) for rank in range(3)]
    for rank, store in enumerate(stores):
        names = np.arange(rank, 9, 3)
        images = np.full((3, 4, 4, 1), 10, np.uint8) * names[:, None, None, None].astype(np.uint8)
        verdict = np.zeros(3, np.uint8)
        store.add(CandidateBatch(names * 0, names, verdict.astype(np.float32), verdict, verdict == 0, images))
        store.flush()
        quota.record(names * 0, names, verdict)
    assert len(list(tmp_path.glob("shard-*"))) == 3
    stores[0].finish(quota)
    names, images = kept(tmp_path)
    assert names == [(0, i) for i in range(9)] and images[:, 0, 0, 0].tolist() == list(range(0, 90, 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance_to": 3, "per_class": 4}, "exclude each other"),
        ({"sampler": "euler"}, "--sampler: expected one of ddim, ddpm, dpm"),
        ({"sampler": "dmp++"}, r"did you mean 'dpm\+\+'"),
        ({"steps": 2000}, "the model has 1000 timesteps"),
        ({"classes": "11"}, "no class 11"),
        ({"export_": ["zip,gif"]}, "expected one of imagefolder, npz"),
    ],
)
def test_bad_options(tiny_run, options, message):
    with pytest.raises(UserError, match=message):
        command(run=tiny_run.path, **options)


def test_without_a_run_the_bundled_one_is_trained_first(tiny_run, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    commands = []

    def pretend(arguments, check, env):
        assert env["WORLD_SIZE"] == "1"  # under torchrun it would wait for processes that never join
        commands.append(arguments)
        run = tmp_path / "runs" / "digits-lt"
        for stage in ("pack",) if "pack" in arguments else ("extractor", "diffusion"):
            shutil.copytree(tiny_run.path / stage, run / stage)
        shutil.copy(tiny_run.path / "config.toml", run)
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(verb.subprocess, "run", pretend)
    start = [sys.executable, "-m", "diffult.run", "--run", "runs/digits-lt", "--until"]
    packing = [*start, "pack", "--preset", "digits-lt"]
    with caplog.at_level("INFO"):
        command(fast=True, dry_run=True)  # prints what would be drawn, and trains nothing for it
        with pytest.raises(UserError, match="no class 99"):
            command(fast=True, classes="99")
        assert commands == [packing]
        for out in ("a", "b"):
            command(fast=True, per_class=1, classes="0", steps=2, out=tmp_path / out)
    assert "running the bundled digits-lt first" in caplog.text
    assert commands == [packing, [*start, "diffusion"]]  # once: the second call finds it
