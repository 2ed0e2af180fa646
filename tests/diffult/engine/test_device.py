"""What the machine is asked for beside arithmetic."""

import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from diffult.engine.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    torch.ones(2**22).mul(2).sum()  # two tensors of 16 MiB, freed again
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_tensors_are_not_asked_for_page_by_page_again() -> None:
    faults = {}
    for mode in ("keep", "hand back"):
        environment = {"MALLOC_MMAP_THRESHOLD_": "1048576", "PATH": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _FAULTS, mode]
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        faults[mode] = int(output)
    assert faults["keep"] < faults["hand back"] / 10
