"""Processes on several hosts: they go on when all see the same files, and are refused where they never do."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffult import generate
from diffult.engine.distributed import World
from diffult.errors import UserError
from diffult.report import write_report
from diffult.runs import files, shared_disk
from diffult.runs.files import lock_folder
from diffult.runs.run_dir import RunDir


class Hosts:
    """Processes that are threads here."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.slots = size, threading.Barrier(size, timeout=60), [None] * size

    def gather(self, rank: int, mine: object) -> list:
        self.slots[rank] = mine
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone


@dataclass
class Process:
    hosts: Hosts
    rank: int

    @property
    def size(self) -> int:
        return self.hosts.size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, mine: object) -> list:
        return self.hosts.gather(self.rank, mine)


def together(function, size: int = 3) -> list:
    """What function(process) returned or raised in each of them."""
    hosts = Hosts(size)

    def run(rank: int) -> object:
        try:
            return function(Process(hosts, rank))
        except UserError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.fixture(autouse=True)
def naps(monkeypatch) -> list[float]:
    """Seconds that were slept, which take none."""
    taken: list[float] = []
    monkeypatch.setattr("diffult.runs.shared_disk.time.sleep", taken.append)
    return taken


def test_hosts_that_see_the_same_files_go_on_at_once(tmp_path, naps):
    (tmp_path / "state.pt").write_bytes(b"1")
    (tmp_path / ".lock").touch()
    assert (
        together(lambda process: shared_disk.wait_for_same_files([tmp_path, tmp_path / "none"], process)) == [None] * 3
    )
    assert not naps


def test_those_that_come_early_look_when_the_last_has_written(tmp_path, naps):
    """Without the second of a look that was too early."""
    others_came = threading.Barrier(3, timeout=60)

    def wait(process: Process) -> None:
        if process.is_main:
            others_came.wait()
            (tmp_path / "state.pt").write_bytes(b"1")
        else:
            gather, first = process.gather, iter([others_came.wait])
            process.gather = lambda mine: (next(first, int)(), gather(mine))[1]
        shared_disk.wait_for_same_files([tmp_path], process)

    assert together(wait) == [None] * 3
    assert not naps


@pytest.mark.parametrize("change", ["missing", "older", "shorter"])
def test_a_host_that_sees_files_late_is_waited_for(tmp_path, naps, monkeypatch, change):
    (tmp_path / "state.pt").write_bytes(b"12")
    known, looks = shared_disk._files, dict.fromkeys(range(3), 0)

    def late(folders, process: Process):
        looks[process.rank] += 1
        seen = dict(known(folders))
        if process.rank == 1 and looks[1] <= 4:
            size, changed = seen.pop("state.pt")
            stale = {"missing": {}, "older": {"state.pt": (size, changed - 1)}, "shorter": {"state.pt": (1, changed)}}
            return stale[change]
        return seen

    def wait(process: Process) -> None:
        monkeypatch.setattr(shared_disk, "_files", lambda folders: late(folders, current.process))
        current.process = process
        shared_disk.wait_for_same_files([tmp_path], process)

    current = threading.local()
    assert together(wait) == [None] * 3
    assert looks == {0: 5, 1: 5, 2: 5} and len(naps) == 3 * 4


def test_separate_disks_are_refused_in_a_line_that_names_hosts_and_file(tmp_path, naps):
    for rank in range(3):
        (tmp_path / str(rank) / "run" / "pack").mkdir(parents=True)
    (tmp_path / "0" / "run" / "pack" / "started.json").write_text("{}")

    def wait(process: Process) -> None:
        run = tmp_path / str(process.rank) / "run"
        shared_disk.wait_for_same_files([run, run / "pack"], process)

    for refusal in together(wait):
        assert "processes 0 and 1" in str(refusal) and "pack/started.json" in str(refusal)
        assert "a disk that all hosts share" in str(refusal) and "\n" not in str(refusal)
    assert len(naps) == 3 * shared_disk.PATIENCE


def test_the_first_process_opens_the_run_for_all(tmp_path):
    """Also where another sees no config.toml yet, and would take the preset's settings."""
    RunDir.open(tmp_path / "run", "digits-lt", ["seed=7"]).save_config()

    def open_run(process: Process) -> int:
        run = RunDir.open(tmp_path / "run", None, None if process.is_main else ["seed=8"], process)
        return run.config.seed

    assert together(open_run) == [7, 7, 7]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_used_and_that_is_logged(tmp_path, monkeypatch, caplog, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_folder(tmp_path):
        (tmp_path / "written").touch()
    assert "has no locks" in caplog.text


def test_other_errors_of_a_lock_are_raised(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="bad disk"), lock_folder(tmp_path):
        pass


HOLDER = """
import sys
from pathlib import Path
from diffult.runs.files import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_lock_that_a_host_left_is_waited_for(tmp_path: Path, monkeypatch):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 5:  # longer than the first attempt is willing to wait
            holder.communicate("\n")

    monkeypatch.setattr(files.time, "sleep", sleep)
    with pytest.raises(UserError, match="another process writes to it"), lock_folder(tmp_path, patience=3):
        pass
    assert slept == [1, 1, 1]
    with lock_folder(tmp_path, patience=3):
        assert len(slept) == 5


def test_one_of_several_processes_waits_for_the_lock_of_a_run(tmp_path: Path, naps):
    """Every stage with which a run goes on, evaluation too, may come first after a host has died."""
    run = RunDir.open(tmp_path / "run", "digits-lt")
    with lock_folder(run.path):
        with pytest.raises(UserError, match="another process writes to it"), run.lock():
            pass
        assert not naps
        with pytest.raises(UserError, match="another process writes to it"), run.lock(World(0, 2)):
            pass
    assert naps == [1] * shared_disk.PATIENCE


def test_a_report_and_stages_of_another_run_wait_for_it_as_well(tiny_run, tmp_path, naps):
    run = RunDir.open(Path(shutil.copytree(tiny_run.path, tmp_path / "run")))
    shutil.rmtree(run.folder("diffusion"))
    with lock_folder(run.path):
        for write in (lambda: run.share(tiny_run, World(0, 2)), lambda: write_report(run, None, World(0, 2))):
            naps.clear()
            with pytest.raises(UserError, match="another process writes to it"):
                write()
            assert naps == [1] * shared_disk.PATIENCE


@pytest.mark.parametrize("rank", [0, 1])
def test_generate_waits_until_all_see_the_samples_of_an_earlier_attempt(tiny_run, tmp_path, naps, monkeypatch, rank):
    """Before any process reads what is in its folder, and with the first one's lock held."""
    (tmp_path / "shard-000-000000.safetensors").write_bytes(b"1")

    held = pytest.raises(UserError, match="writes to it") if rank == 0 else nullcontext()

    def wait(folders: list[Path], world: World) -> None:
        assert folders == [tmp_path] and world == World(rank, 2)
        with held, lock_folder(tmp_path):
            pass
        raise UserError("they see other files")

    monkeypatch.setattr(generate, "wait_for_same_files", wait)
    monkeypatch.setattr(generate, "init_distributed", lambda: World(rank, 2))
    monkeypatch.setattr(generate.RunDir, "open", lambda *_, **__: tiny_run)
    with pytest.raises(UserError, match="they see other files"):
        generate.command(run=tiny_run.path, fast=True, steps=1, per_class=1, compile_=False, out=tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "shard-000-000000.safetensors"}


def test_generate_waits_for_the_lock_that_a_host_left(tiny_run, tmp_path, naps, monkeypatch):
    monkeypatch.setattr(generate, "init_distributed", lambda: World(0, 2))
    monkeypatch.setattr(generate.RunDir, "open", lambda *_, **__: tiny_run)
    with lock_folder(tmp_path), pytest.raises(UserError, match="another process writes to it"):
        generate.command(run=tiny_run.path, fast=True, steps=1, per_class=1, compile_=False, out=tmp_path)
    assert naps == [1] * shared_disk.PATIENCE
