"""One process or several: the same losses, and a checkpoint that the other number of processes takes up."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from diffult import evaluate, report
from diffult.engine.distributed import ALONE, World, init_distributed
from diffult.errors import UserError
from diffult.models import unet
from diffult.run import run_pipeline
from diffult.runs.files import load_state, load_tensors
from diffult.runs.run_dir import RunDir
from diffult.train_diffusion import seconds_per_step, train_diffusion

# float32: in bfloat16, where a machine has it, sums of other parts round by too much to tell a mistake from.
SETTINGS = [
    *TINY,
    "precision=float32",
    "unet.dropout=0.0",
    "diffusion.steps=8",
    "diffusion.checkpoint_every=2",
    "diffusion.cbdm_share=0.5",
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run whose diffusion model was trained by one process, with a look at the loss at every second step."""
    path = tmp_path_factory.mktemp("alone") / "run"
    run_pipeline(RunDir.open(path, "digits-lt", SETTINGS), "diffusion")
    return path


def losses(run: Path) -> list[dict]:
    lines = (run / "diffusion" / "metrics.jsonl").read_text().splitlines()
    names = ("step", "loss", "ddpm", "cbdm", "aid", "gradient")
    return [{name: json.loads(line)[name] for name in names} for line in lines]


def with_extractor(path: Path, settings: list[str] = SETTINGS) -> RunDir:
    run = RunDir.open(path, "digits-lt", settings)
    run_pipeline(run, "extractor")
    return run


def torchrun(count: int, *program: str) -> subprocess.CompletedProcess:
    """Options of torchrun may come before the program."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def in_processes(count: int, run: RunDir) -> None:
    out = torchrun(count, "-m", "--", "diffult.train_diffusion", "--run", str(run.path))
    assert out.returncode == 0, out.stderr[-3000:]


# The command, one of whose processes dies as it begins a step: which one, and at which step, in each attempt in turn.
DYING = """
import os, signal
from diffult import cli, train_diffusion
from diffult.engine import loop

deaths = {deaths}
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])

def seed_step(*key):
    if deaths[attempt:] and deaths[attempt] == (rank, key[-1]):
        os.kill(os.getpid(), signal.SIGKILL)
    known(*key)

known, loop.seed_step = loop.seed_step, seed_step
cli.main(train_diffusion.command)
"""


def assert_same_model(a: Path, b: Path) -> None:
    (x, _), (y, _) = (load_tensors(path / "diffusion" / "ema.safetensors") for path in (a, b))
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=2e-3, atol=2e-5, msg=name)


def assert_same_losses(a: Path, b: Path) -> None:
    assert [line["step"] for line in losses(a)] == [2, 4, 6, 8]
    for x, y in zip(losses(a), losses(b), strict=True):
        assert y == pytest.approx(x, rel=1e-3)


def test_two_processes_train_as_one(alone, tmp_path):
    run = with_extractor(tmp_path / "run")
    in_processes(2, run)
    assert_same_losses(alone, run.path)
    assert_same_model(alone, run.path)


def test_two_processes_go_on_where_one_was_interrupted(alone, tmp_path, monkeypatch):
    run = with_extractor(tmp_path / "run")
    seen = []

    def seed_step(*key):
        seen.append(key)
        if len(seen) == 6:  # two looks are behind it, the checkpoint of step 4 is there
            raise KeyboardInterrupt

    monkeypatch.setattr("diffult.engine.loop.seed_step", seed_step)
    with pytest.raises(KeyboardInterrupt):
        train_diffusion(run)
    assert [line["step"] for line in losses(run.path)] == [2, 4]
    in_processes(2, run)
    assert_same_losses(alone, run.path)
    assert_same_model(alone, run.path)


def dying(path: Path, run: RunDir, *deaths: tuple[int, int], restarts: int) -> subprocess.CompletedProcess:
    (path / "dying.py").write_text(DYING.format(deaths=deaths))
    return torchrun(2, f"--max-restarts={restarts}", "--", str(path / "dying.py"), "--run", str(run.path))


@pytest.mark.slow  # half a minute, most of it to import everything twice
def test_one_process_goes_on_where_two_were_killed(alone, tmp_path):
    run = with_extractor(tmp_path / "run")
    out = dying(tmp_path, run, (1, 7), restarts=0)
    assert out.returncode != 0 and "SIGKILL" in out.stderr, out.stderr[-3000:]
    found = [load_state(file)["step"] for file in sorted(run.folder("diffusion").glob("state*.pt"))]
    assert found in ([2, 4], [4, 6])  # that of step 6 may not have come to the disk
    train_diffusion(run)
    assert_same_losses(alone, run.path)
    assert_same_model(alone, run.path)


@pytest.mark.slow  # a minute
def test_torchrun_starts_killed_processes_again_and_the_model_is_the_same(tmp_path):
    whole, run = with_extractor(tmp_path / "whole"), RunDir.open(tmp_path / "run", "digits-lt", SETTINGS)
    run.share(whole)
    in_processes(2, whole)
    steps = random.sample(range(8), 2)
    out = dying(tmp_path, run, (1, min(steps)), (0, max(steps)), restarts=3)
    assert out.returncode == 0 and out.stderr.count("(exitcode: -9)") == 2, out.stderr[-3000:]
    assert_same_losses(whole.path, run.path)
    (x, _), (y, _) = (load_tensors(r.folder("diffusion") / "ema.safetensors") for r in (whole, run))
    assert all(torch.equal(x[name], y[name]) for name in x), steps


def test_recomputed_activations_train_as_kept_ones(alone, tmp_path, monkeypatch):
    """To the bit, and with dropout, which draws the same numbers again."""
    recomputed, checkpoint = [], unet.checkpoint
    monkeypatch.setattr(unet, "checkpoint", lambda *a, **k: recomputed.append(k) or checkpoint(*a, **k))
    monkeypatch.setattr("diffult.engine.loop._LOG_EVERY", 1)

    def train(recompute: str) -> Path:
        settings = [*SETTINGS, "unet.dropout=0.3", "diffusion.steps=4", "diffusion.checkpoint_every=4"]
        settings.append(f"unet.gradient_checkpointing={recompute}")
        run = RunDir.open(tmp_path / recompute, "digits-lt", settings)
        run.share(RunDir.open(alone))
        train_diffusion(run)
        return run.path

    kept = train("false")
    assert not recomputed
    again = train("true")
    assert len(recomputed) >= 4  # in every step, and it drops
    assert len(losses(kept)) == 4 and losses(again) == losses(kept)
    weights = [load_tensors(path / "diffusion" / "ema.safetensors")[0] for path in (kept, again)]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_processes_measure_as_many_steps_as_the_first_says(fresh, monkeypatch):
    """By its own clock each would stop at another step, and one of them wait for ever."""
    decisions, steps = iter([True] * 7 + [False]), []

    def build(*_):
        step = lambda i, batch: steps.append(i) or {"loss": torch.zeros(())}  # noqa: E731
        return SimpleNamespace(step=step, batches=lambda start: itertools.repeat(None), flops={"forward": 1.0})

    monkeypatch.setattr("diffult.train_diffusion.build_trainer", build)
    monkeypatch.setattr(World, "gather", lambda _, mine: [next(decisions), mine])
    seconds_per_step(fresh, World(1, 2))
    assert steps == [*range(5), *range(7)]  # the first five compile


@pytest.mark.parametrize("verb", [evaluate, report])
def test_what_cannot_be_shared_is_done_by_the_first_process_alone(tiny_run, monkeypatch, capsys, verb):
    monkeypatch.setattr(verb, "init_distributed", lambda: World(1, 2))
    monkeypatch.setattr(verb.RunDir, "open", lambda *_, **__: tiny_run)
    barriers = []
    monkeypatch.setattr(World, "barrier", lambda world: barriers.append(world))
    before = (tiny_run.path / "report.html").stat().st_mtime_ns
    verb.command(tiny_run.path)
    assert capsys.readouterr().out == "" and len(barriers) == 1
    assert (tiny_run.path / "report.html").stat().st_mtime_ns == before


def test_accumulated_parts_train_as_the_whole_batch(alone, tmp_path):
    run = with_extractor(tmp_path / "run", [*SETTINGS, "diffusion.accumulate=4"])
    run_pipeline(run, "diffusion")
    assert_same_losses(alone, run.path)
    assert_same_model(alone, run.path)


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match=r"diffusion.batch_size = 8 cannot be shared by 3 processes"):
        World(0, 3).local_slice(8, "diffusion.batch_size")
    assert [World(rank, 4).local_slice(8, "b") for rank in range(4)] == [
        slice(0, 2),
        slice(2, 4),
        slice(4, 6),
        slice(6, 8),
    ]


def test_a_process_that_torchrun_did_not_start_is_refused_in_one_line(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert init_distributed() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        UserError, match=r"WORLD_SIZE is set, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT not: start .*"
    ) as e:
        init_distributed()
    assert "\n" not in str(e.value)
