"""A rehearsal: what it leaves, what follows from what it measured, and that each kind of failure is found."""

import json
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from torch.distributed import HashStore

from diffult.config import load_preset
from diffult.engine.distributed import World
from diffult.errors import UserError
from diffult.planning import Plan
from diffult.planning.cost import Amounts
from diffult.planning.failures import missing_files
from diffult.planning.rehearsal import Part, Rehearsal, Rehearsed, lines
from diffult.rehearse import _Context, _measure, rehearse
from diffult.run import command
from diffult.runs.files import lock_folder
from diffult.runs.run_dir import RunDir
from ffcv_writers.readers import open_source

STAGES = ["pack", "extractor", "diffusion", "generate", "classifier", "evaluate"]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Of the tiny run, before it begins."""
    run = RunDir.open(tmp_path_factory.mktemp("runs") / "run", "digits-lt", [*TINY, "classifier.methods=['ce', 'crt']"])
    return run, *rehearse(run, 0.01)


def test_it_leaves_one_file_and_the_run_may_begin(rehearsed):
    run, rehearsal, failures = rehearsed
    assert [file.name for file in run.path.iterdir()] == ["rehearsal.json"]
    content = json.loads((run.path / "rehearsal.json").read_text())
    assert list(content["stages"]) == STAGES and content["failures"] == failures == []
    assert content["stages"]["diffusion"]["seconds"] == pytest.approx(rehearsal.costs()[2][0].seconds)
    assert RunDir.open(run.path, "digits-lt", TINY).config.name == "digits-lt"


def test_every_stage_has_times_counts_and_memory(rehearsed):
    _, rehearsal, _ = rehearsed
    for cost, least, most in rehearsal.costs():
        stage = rehearsal.stages[cost.stage]
        assert 0 < least <= cost.seconds <= most and cost.memory == stage.host > 1e8, cost.stage
    counts = {(name, part.what): part.number(rehearsal.work[name].units)
              for name, stage in rehearsal.stages.items() for part in stage.parts}  # fmt: skip
    assert counts["extractor", "steps"] == 12 and counts["diffusion", "steps"] == 6
    assert counts["diffusion", "previews"] == counts["diffusion", "checkpoints"] == 2
    assert counts["classifier", "steps of ce"] == 8  # crt starts from it, and adds its head's
    assert sum(n for (name, what), n in counts.items() if what.startswith("steps of")) == pytest.approx(
        rehearsal.work["classifier"].units
    )
    assert counts["generate", "samples kept"] == np.maximum(10 - rehearsal.amounts.counts, 0).sum()
    assert counts["evaluate", "images classified"] == 2 * rehearsal.amounts.held_out
    assert {"loader", "network"} == set(rehearsal.stages["diffusion"].images_per_s)


def measured(**images_per_s):
    """A rehearsal of the tiny run of three classes, as if so many seconds had been measured."""
    times = {
        "pack": [Part("start", (2.0,), count=1), Part("images", (0.25, 0.5), share=1.0)],  # 60 of them
        "extractor": [Part("images measured", (0.1,), count=50), Part("steps", (1.0, 2.0, 6.0), share=1.0)],  # 12
        "diffusion": [Part("steps", (2.0, 3.0), share=1.0), Part("checkpoints", (0.5,), count=2)],  # 6
        "generate": [Part("samples drawn", (0.5, 1.0, 1.5), share=1.0)],  # of 9, half of which pass: 24 in batches of 8
        "classifier": [Part("steps of ce", (0.5,), share=0.5), Part("steps of diffult", (1.0,), share=0.5)],  # 16
        "evaluate": [Part("images classified", (0.25,), share=1.0)],  # 10 by 2 methods
    }
    stages = {name: Rehearsed(parts, images_per_s=images_per_s, disk=0.0) for name, parts in times.items()}
    amounts = Amounts(np.array([40, 2, 9]), np.full(3, 2.0), 10, 60, 0.0)
    return Rehearsal(load_preset("digits-lt", TINY), amounts, stages=stages, passing=0.5)


def test_the_sum_is_what_one_took_times_how_many_there_are():
    found = {cost.stage: (least, cost.seconds, most) for cost, least, most in measured().costs()}
    assert found == {
        "pack": (17.0, 24.5, 32.0),
        "extractor": (17.0, 29.0, 77.0),
        "diffusion": (13.0, 16.0, 19.0),
        "generate": (12.0, 24.0, 36.0),
        "classifier": (12.0, 12.0, 12.0),
        "evaluate": (5.0, 5.0, 5.0),
    }
    text = lines(measured(), price=7200.0)  # 2 a second
    assert "money: 221.00 (152.00 to 362.00) for 1 device at 7200 an hour each" in text
    assert [line.split()[0] for line in text[1:7]] == STAGES


@pytest.mark.parametrize(
    ("loader", "network", "said"),
    [
        (1234.0, 98.76, "loader alone 1,230 images/s, network alone 99 images/s: the network is the bottleneck"),
        (98.76, 1234.0, "loader alone 99 images/s, network alone 1,230 images/s: the loader is the bottleneck"),
    ],
)
def test_the_slower_of_loader_and_network_bounds(loader, network, said):
    text = lines(measured(loader=loader, network=network), None)
    assert f"extractor: {said}" in re.sub(r"\n +", " ", "\n".join(text)) and max(map(len, text[8:])) <= 80


def test_busy_neighbours_are_named():
    rehearsal = measured()
    assert not any("other programs" in line for line in lines(rehearsal, None))
    rehearsal.others = 0.45
    assert any("other programs were running and took 45% of the" in line for line in lines(rehearsal, None))


def test_a_trained_model_shows_which_class_hardly_passes(tiny_run, tmp_path):
    """No sample is as near to the centre of its class as class 9 asks for, every sample of the others is."""
    run = copied(tiny_run, tmp_path, "pack", "extractor", "diffusion")
    run = RunDir.open(run.path, overrides=["generate.batch_size=80"])  # enough of each class however slow the machine
    file = run.path / "extractor" / "statistics.safetensors"
    statistics = load_file(file)
    statistics["radii"][:] = 1e9
    statistics["radii"][9] = 1e-9
    save_file(statistics, file)
    rehearsal, failures = rehearse(run, 0.01)
    finished = [name for name, stage in rehearsal.stages.items() if stage.finished]
    assert finished == ["pack", "extractor", "diffusion"] and 0 < rehearsal.passing <= 1
    drawn = rehearsal.stages["generate"].candidates[0]
    (failure,) = failures
    assert failure.startswith(f"generate: 9 (1 class): the filter kept 0 of {drawn[9]} candidates") and drawn[9] >= 8
    assert sorted(file.name for file in run.path.iterdir() if file.name != ".lock") == [
        "config.toml", "diffusion", "extractor", "pack", "rehearsal.json",
    ]  # fmt: skip


def test_out_of_memory_is_one_stages_failure(tmp_path, monkeypatch):
    def build(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("diffult.rehearse.build_trainer", build)
    rehearsal, failures = rehearse(RunDir.open(tmp_path / "run", "digits-lt", TINY), 0.01)
    assert len(failures) == 1 and failures[0].startswith("diffusion: out of memory (CUDA out of memory")
    assert rehearsal.stages["generate"].parts and rehearsal.stages["classifier"].parts
    assert lines(rehearsal, None)[3].split()[:2] == ["diffusion", "unknown"]
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["rehearsal.json"]


def test_the_disk_is_measured_without_the_rehearsals_own_files(tmp_path, monkeypatch):
    """Its folder is as good as all of the disk: as long as it is there nothing else has room."""
    run = RunDir.open(tmp_path / "run", "digits-lt", TINY)

    def work(real, scratch, *_):
        scratch.path.mkdir(parents=True)
        return measured()

    def usage(place):
        return SimpleNamespace(free=0 if (run.path / ".rehearsal").exists() else 1e12)

    monkeypatch.setattr("diffult.rehearse._rehearse", work)
    monkeypatch.setattr("shutil.disk_usage", usage)
    assert rehearse(run, 0.01)[1] == []
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=-1))
    assert rehearse(run, 0.01)[1][0].startswith("disk: the run takes")


def test_processes_of_a_machine_share_its_free_memory(monkeypatch):
    bounds = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("diffult.rehearse.free_host_memory", lambda: 8e9)
    monkeypatch.setattr("diffult.rehearse.bounded_memory", lambda free: (bounds.append(free), nullcontext())[1])
    _measure("extractor", lambda context, into: None, _Context(None, None, None, 1.0, World()), Rehearsed())
    assert bounds == [2e9]


def test_a_rehearsal_of_own_images_prints_one_table_of_costs(tmp_path, monkeypatch, capsys):
    plan = Plan(load_preset("digits-lt"), {}, ["the settings"], ["the plan's table"])
    monkeypatch.setattr("diffult.run.propose", lambda *_: plan)
    monkeypatch.setattr("diffult.run.print_rehearsal", lambda *_: print("the rehearsal's table"))
    command(run=tmp_path / "run", data=tmp_path, minutes=1.0)
    assert capsys.readouterr().out == "the settings\nthe rehearsal's table\n"
    command(run=tmp_path / "planned", data=tmp_path, plan=True)
    assert capsys.readouterr().out.startswith("the settings\nthe plan's table\n")


def test_images_that_are_not_there_are_refused_in_one_line(tmp_path):
    run = RunDir.open(tmp_path / "run", "imagenet-lt-64", [f"data.path={tmp_path}/none"])
    with pytest.raises(UserError, match=r"data.path .*/none does not exist"):
        rehearse(run, 0.01)
    assert not (tmp_path / "run").exists()


def test_missing_files_of_a_list_are_counted(tmp_path):
    names = [f"{i}.png" for i in range(5)]
    for name in names[:3]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "train.txt").write_text("".join(f"{name} 0\n" for name in names))
    source = open_source("list", tmp_path, train_list=tmp_path / "train.txt")
    missing, failures = missing_files(source, {"train": np.array([0, 2, 4, 3])})
    assert missing["train"].tolist() == [False, False, True, True]
    assert failures == [
        f"2 files are missing in split train: {tmp_path}/4.png, {tmp_path}/3.png; restore them, or correct the list"
    ]
    for name in names[:3]:
        (tmp_path / name).unlink()
    assert f"{tmp_path}/2.png and 2 more; restore" in missing_files(source, {"train": np.arange(5)})[1][0]


@pytest.mark.parametrize(
    "options", [{"price": 2.0}, {"minutes": 1.0, "from_": Path("other")}, {"minutes": 1.0, "until": "pack"}]
)
def test_options_without_a_meaning_are_refused(options):
    with pytest.raises(UserError, match="--rehearse"):
        command(preset="digits-lt", **options)


def test_another_rehearsal_of_the_run_is_refused(tmp_path):
    run = RunDir.open(tmp_path / "run", "digits-lt", TINY)
    with lock_folder(run.path / ".rehearsal"), pytest.raises(UserError, match="another process writes to it"):
        rehearse(run, 0.01)


def copied(run, tmp_path, *stages):
    for stage in stages:
        shutil.copytree(run.path / stage, tmp_path / "run" / stage)
    shutil.copy(run.path / "config.toml", tmp_path / "run")
    return RunDir.open(tmp_path / "run")


@pytest.mark.timeout(200)
@pytest.mark.slow  # half a minute
def test_two_processes_rehearse_together_and_a_batch_they_cannot_share_fails(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    command += ["diffult.run", "--preset", "digits-lt", "--run", str(tmp_path / "run"), "--rehearse", "0.01"]
    settings = [*TINY, "extractor.batch_size=7"]
    out = subprocess.run(
        [*command, *(part for setting in settings for part in ("--set", setting)), "--price", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert out.returncode != 0 and "2 devices" in out.stdout, out.stderr[-3000:]
    failures = [line for line in out.stdout.splitlines() if line.startswith("would fail")]
    assert failures == ["would fail: extractor: batch_size = 7 cannot be shared by 2 processes; make it a multiple"]
    content = json.loads((tmp_path / "run" / "rehearsal.json").read_text())
    assert content["processes"] == 2 and not content["stages"]["extractor"]["images_per_s"]
    assert all(content["stages"][name]["seconds"] > 0 for name in STAGES if name != "extractor")


@pytest.mark.parametrize("refused", [{0, 1}, {0}])
def test_a_refusal_ends_the_rehearsal_where_another_process_waits_in_the_stage(monkeypatch, refused):
    """Two processes, here threads: both refused, the stage has failed; one alone, it ends, and so the other one."""
    store, meeting, refusals = HashStore(), threading.Barrier(2, timeout=20), []
    monkeypatch.setattr(World, "store", lambda _: store)
    monkeypatch.setattr(World, "gather", lambda _, mine: (meeting.wait(), [mine, mine])[1])
    if len(refused) == 1:  # it waits in vain; two have ten seconds to meet
        monkeypatch.setattr("diffult.rehearse._SOON", 0.2)
    monkeypatch.setattr("diffult.rehearse.bounded_memory", lambda free: nullcontext())

    def measure(rank: int) -> list[str]:
        def work(context, into):
            if rank in refused:
                raise UserError("no room")
            context.world.gather(None)

        into, context = Rehearsed(), _Context(None, None, None, 1.0, World(rank, 2))
        try:
            _measure("extractor", work, context, into)
        except UserError as error:
            refusals.append(str(error))
            meeting.abort()
        except threading.BrokenBarrierError:
            refusals.append("lost the other process")
        return into.failures

    with ThreadPoolExecutor(2) as pool:
        failures = list(pool.map(measure, range(2)))
    alone = ["extractor, process 0: no room", "lost the other process"]
    assert (failures, refusals) == (([["no room"]] * 2, []) if len(refused) == 2 else ([[], []], alone))
