"""Processes that torchrun starts again meet their own kind in the store that it keeps, not those that have ended."""

import datetime
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from diffult.engine import distributed
from diffult.errors import UserError

# The second process is killed in the first attempt, once all have met and left something in their store.
PROGRAM = """
import os, signal, time
import torch.distributed as dist
from diffult.engine.distributed import init_distributed

world = init_distributed()
store = dist.distributed_c10d._get_default_store()
if world.gather(int(os.environ["TORCHELASTIC_RESTART_COUNT"])) == [0, 0]:
    store.set("left", "")
    world.barrier()
    if world.rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
print(f"met {store.check(['left'])}\\n", end="", flush=True)  # in one write: two processes share the pipe
"""


def test_an_attempt_has_one_name_that_is_new():
    store, names = dist.HashStore(), []
    for size, late in ((3, None), (3, 0), (3, 2), (4, 1), (2, 1)):  # processes; the last of them to come

        def join(rank: int, size: int = size, late: int | None = late) -> str:
            time.sleep(0.2 * (rank == late))
            return distributed._attempt(store, rank, size)

        with ThreadPoolExecutor(size) as pool:
            (name,) = set(pool.map(join, range(size)))
        names.append(name)
    assert len(set(names)) == 5


@pytest.mark.parametrize(
    ("rank", "left", "reason"),
    [
        (0, {"attempt/1": "a", "attempt/2": "b"}, "process 1 has not answered for 0.005 minutes"),
        (1, {"attempt/numbers": "a b c"}, "the first process has not answered for 0.005 minutes"),
        (0, {}, "[Tt]imeout"),
        (1, {}, "[Tt]imeout"),
    ],
)
def test_processes_that_never_answer_are_waited_for_no_longer_than_others(monkeypatch, rank, left, reason):
    """They have left their numbers, or nothing, and are gone."""
    store = dist.HashStore()
    for key, value in left.items():
        store.set(key, value)

    def rendezvous(url: str, timeout: datetime.timedelta):
        store.set_timeout(timeout)
        return iter([(store, rank, 3)])

    monkeypatch.setattr(distributed, "_TIMEOUT", datetime.timedelta(seconds=0.3))
    monkeypatch.setattr(dist, "rendezvous", rendezvous)
    about = {"WORLD_SIZE": 3, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, text in about.items():
        monkeypatch.setenv(name, str(text))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=rf"cannot join the other processes \(.*{reason}.*; start all of them"):
        distributed.init_distributed()


@pytest.mark.timeout(200)
def test_processes_that_are_started_again_have_a_store_of_their_own(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    out = subprocess.run([*torchrun, str(tmp_path / "program.py")], capture_output=True, text=True, check=False)
    assert out.returncode == 0 and out.stdout.count("met False") == 2, out.stderr[-3000:]
