"""Checkpoints are written while training goes on; two are kept, and whatever is killed leaves one to resume from."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from diffult.engine import checkpoints
from diffult.engine.checkpoints import Checkpoints
from diffult.engine.distributed import World
from diffult.engine.loop import LoopConfig, train_loop
from diffult.errors import UserError
from diffult.runs.files import load_state

WAIT = 20.0  # seconds, for what takes none


def train(path, steps=6, each=lambda i: None, batches=range, **config):
    """A weight that counts the steps; a checkpoint after every second one. Returns it."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def step(i, batch):
        each(i)
        with torch.no_grad():
            model.weight.add_(1)
        return {"loss": torch.ones(())}

    job = LoopConfig("t", steps, path, 2, (0, 0), "a", **config)
    train_loop(job, lambda start: iter(batches(start, steps)), step, {"model": model})
    return model.weight.item()


def kept(folder):
    return {file.name: load_state(file)["step"] for file in folder.glob("*.pt")}


def test_the_last_two_are_kept(tmp_path):
    assert train(tmp_path / "diffult.state.pt", 2) == 2 and kept(tmp_path) == {"diffult.state.pt": 2}
    assert train(tmp_path / "diffult.state.pt") == 6
    assert kept(tmp_path) == {"diffult.state.pt": 6, "diffult.state.previous.pt": 4}


def test_it_is_written_while_training_goes_on_and_is_of_its_step(tmp_path, monkeypatch):
    """The first is held back until step 3 has begun: the loop does not wait for it, the next checkpoint does."""
    going_on, order, save = threading.Event(), [], checkpoints.save_state

    def late(path, state, backup):
        assert going_on.wait(WAIT)
        order.append(("written", state["step"], state["model"]["weight"].item()))
        save(path, state, backup)

    def each(i):
        order.append(i)
        if i == 3:
            going_on.set()

    monkeypatch.setattr(checkpoints, "save_state", late)
    train(tmp_path / "state.pt", each=each)
    written = [entry for entry in order if isinstance(entry, tuple)]
    assert written == [("written", 2, 2.0), ("written", 4, 4.0), ("written", 6, 6.0)]
    assert order.index(3) < order.index(written[0]) < order.index(4)
    assert kept(tmp_path) == {"state.pt": 6, "state.previous.pt": 4}  # it ends with all on disk


def test_a_write_that_fails_ends_training_at_the_next_opportunity(tmp_path, monkeypatch):
    seen = []

    def full(path, state, backup):
        raise UserError(f"{path}: cannot be written (is the disk full?); choose another place or make room")

    monkeypatch.setattr(checkpoints, "save_state", full)
    with pytest.raises(UserError, match="is the disk full") as caught:
        train(tmp_path / "state.pt", 100, each=seen.append)
    assert "\n" not in str(caught.value) and seen[-1] <= 3
    seen.clear()
    with pytest.raises(UserError, match="is the disk full"):  # the last of all
        train(tmp_path / "state.pt", 2, each=seen.append)
    assert seen == [0, 1]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_damaged_one_is_passed_over_and_loses_steps_alone(tmp_path, caplog, content):
    path = tmp_path / "state.pt"
    train(path, metrics=tmp_path / "metrics.jsonl", images=1)
    whole = path.read_bytes()
    at = whole.find(torch.tensor(6.0).numpy().tobytes())  # the weight: a flipped bit
    damaged = whole[:at] + b"\x01" + whole[at + 1 :] if content is None else content
    path.write_bytes(damaged)
    seen = []
    assert train(path, 10, seen.append, metrics=tmp_path / "metrics.jsonl", images=1) == 10
    assert seen == [4, 5, 6, 7, 8, 9] and kept(tmp_path) == {"state.pt": 10, "state.previous.pt": 8}
    aside = "state.pt: damaged checkpoint, set aside as state.pt.damaged; going on from the one before, of step 4"
    assert aside in caplog.text and (tmp_path / "state.pt.damaged").read_bytes() == damaged
    checkpoints.check_checkpoints(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]


def no_memory(*_, **__):
    torch.empty(2**60, dtype=torch.uint8)


def raising(kind, *about):
    def fail(*_, **__):
        raise kind(*about)

    return fail


FAILURES = {
    "disk": raising(OSError, errno.EIO, os.strerror(errno.EIO)),
    "no file": raising(OSError, errno.ESTALE, os.strerror(errno.ESTALE)),
    "memory": raising(MemoryError),
    "memory of torch": no_memory,
    "memory of the card": raising(torch.OutOfMemoryError, "CUDA out of memory"),
    "card": raising(torch.AcceleratorError, "CUDA error: an illegal memory access was encountered", 700),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("where", ["zipfile.ZipFile.testzip", "torch.load", "torch.nn.Module.load_state_dict"])
def test_a_machine_that_fails_while_one_is_read_damages_none(tmp_path, monkeypatch, failure, where):
    path = tmp_path / "state.pt"
    train(path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch, pytest.raises((OSError, MemoryError, RuntimeError)) as caught:
        patch.setattr(where, FAILURES[failure])
        train(path, 10)
    if isinstance(caught.value, OSError) and "load_state_dict" not in where:
        assert caught.value.filename == str(path)  # for the command's last line
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    seen = []
    assert train(path, 10, seen.append) == 10 and seen == [6, 7, 8, 9]


def test_where_both_are_damaged_it_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    train(path)
    for file in tmp_path.glob("*.pt"):
        file.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"state.pt: damaged checkpoint .*; delete it and state.previous.pt, damaged too, to restart"
    ):
        train(path)
    with pytest.raises(UserError, match=r"state.pt: damaged checkpoint"):
        checkpoints.check_checkpoints(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"state.previous.pt: damaged checkpoint"):
        checkpoints.check_checkpoints(tmp_path)


def test_processes_that_see_other_files_are_refused(tmp_path, monkeypatch):
    train(tmp_path / "state.pt", 2)
    monkeypatch.setattr(checkpoints, "wait_for_same_files", lambda folders, world: None)
    monkeypatch.setattr(World, "gather", lambda _, mine: [mine, 0])
    with (
        pytest.raises(UserError, match="find checkpoints of steps 2, 0; put the run on a disk that all of them share"),
        Checkpoints(tmp_path / "state.pt", "a", {}, World(0, 2)) as pair,
    ):
        pair.load()


def test_a_host_that_sees_the_newest_late_loads_that_one(tmp_path, monkeypatch):
    """As when the loss has diverged just after a checkpoint, which the disk of another host does not show yet."""
    train(tmp_path / "state.pt", 2)
    hidden = (tmp_path / "state.pt").rename(tmp_path / "hidden")

    def wait(folders, world):
        assert folders == [tmp_path]
        hidden.rename(tmp_path / "state.pt")

    monkeypatch.setattr(checkpoints, "wait_for_same_files", wait)
    monkeypatch.setattr(World, "gather", lambda _, mine: [2, mine])
    with Checkpoints(tmp_path / "state.pt", "a", {}, World(1, 2)) as pair:
        assert pair.load() == (2, 1.0)


# Children that train on from what is there, each killed in the middle of a write or before a rename; the parent prints
# the steps that a last one takes up from, then what it ends with.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from diffult.runs import files
sys.path.insert(0, sys.argv[2])
from test_checkpoints import train

path, save, replace = Path(sys.argv[1]) / "state.pt", torch.save, os.replace

def child(fatal, half):
    calls = 0
    def dies(function):
        def dying(*arguments):
            nonlocal calls
            calls += 1
            if calls == fatal:
                if half:
                    arguments[1].write_bytes(b"PK half")
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)
        return dying
    if half:
        torch.save = dies(save)
    else:
        os.replace = dies(replace)
    train(path, 40)

for fatal, half in [(2, True), (1, False), (2, False), (3, False), (4, False), (5, False), (3, True), (0, False)]:
    seen = []
    pid = os.fork()
    if pid == 0:
        child(fatal, half)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]) == bool(fatal)
    print(sorted(files.load_state(file)["step"] for file in path.parent.glob("*.pt")))
"""


def test_killed_while_it_writes_it_leaves_one_to_resume_from(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    left = [json.loads(line) for line in out.stdout.splitlines()]
    newest = [steps[-1] for steps in left]
    assert newest == sorted(newest) and newest[0] == 2 and left[-1] == [38, 40]
    assert {len(steps) for steps in left} == {1, 2}
    assert train(tmp_path / "state.pt", 40) == 40


@pytest.mark.parametrize(("of_data", "of_steps", "least", "most"), [(0.1, 0.1, 0.3, 0.8), (0.0, 0.1, 0.0, 0.3)])
def test_the_share_of_time_that_is_waited_for_data_is_reported(tmp_path, of_data, of_steps, least, most):
    def batches(start, stop):
        for i in range(start, stop):
            time.sleep(of_data)
            yield i

    train(tmp_path / "s.pt", 6, lambda _: time.sleep(of_steps), batches, metrics=tmp_path / "metrics.jsonl", images=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(least <= line["data_wait"] <= most for line in lines)
