"""Processes that torchrun starts again meet their own kind in the store that it keeps, not those that have ended."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from diffult.engine import distributed

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


@pytest.mark.timeout(200)
def test_processes_that_are_started_again_have_a_store_of_their_own(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    out = subprocess.run([*torchrun, str(tmp_path / "program.py")], capture_output=True, text=True, check=False)
    assert out.returncode == 0 and out.stdout.count("met False") == 2, out.stderr[-3000:]
