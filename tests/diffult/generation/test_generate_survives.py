"""What happens to the command: killed, interrupted, disk full, no permission, no model, a class that never passes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from diffult.generation.shards import open_kept
from diffult.runs.files import load_tensors
from diffult.runs.run_dir import RunDir

# Imports the command once and forks a child for each line `[arguments, log, file size limit, file]`: a real process
# with a real exit code, without the seconds of importing. It never computes, so it may fork. A child that has ended
# keeps its number until an empty line asks for its exit code. Every batch gets a shard of its own. A child dies by
# SIGKILL when it is about to rename to or to remove the file named last, where one is.
NURSERY = """
import json, os, resource, sys
import sklearn.datasets
import signal
from pathlib import Path
from diffult import cli, generate
from diffult.generation import shards

shards.SHARD_BYTES = 0

def die_before(name):
    replace, unlink = os.replace, Path.unlink

    def dying_replace(a, b):
        os.kill(os.getpid(), signal.SIGKILL) if Path(b).name == name else replace(a, b)

    def dying_unlink(path, missing_ok=False):
        os.kill(os.getpid(), signal.SIGKILL) if path.name == name else unlink(path, missing_ok)

    os.replace, Path.unlink = dying_replace, dying_unlink

for line in sys.stdin:
    if line == "\\n":
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    arguments, told, limit, fatal = json.loads(line)
    pid = os.fork()
    if pid == 0:
        out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if fatal:
            die_before(fatal)
        sys.argv = ["generate", *arguments]
        code = 1
        try:
            cli.main(generate.command)
        except SystemExit as exit:
            code = exit.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
"""


class Nursery:
    """Starts commands, one at a time, and reports their exit codes, negative where a signal ended them."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

    def start(self, arguments: list[object], told: Path, file_size: int = 0, fatal: str = "") -> int:
        """The process; what it prints goes to the file `told`; it can write no file over `file_size`, where given, and
        dies before it renames or removes the file `fatal`."""
        return self._ask(json.dumps([[str(a) for a in arguments], str(told), file_size, fatal]))

    def wait(self) -> int:
        return self._ask("")

    def _ask(self, line: str) -> int:
        print(line, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def run(self, arguments: list[object], told: Path, file_size: int = 0) -> tuple[int, str]:
        """Exit code and last line; there must be no traceback."""
        self.start(arguments, told, file_size)
        code, text = self.wait(), told.read_text().replace("\r", "\n")
        assert "Traceback" not in text, text[-3000:]
        return code, text.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    arguments = [sys.executable, "-c", NURSERY]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Nursery(process)
        process.stdin.close()


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory) -> RunDir:
    """A copy of the tiny run: what others do with theirs is not seen here."""
    return RunDir.open(Path(shutil.copytree(tiny_run.path, tmp_path_factory.mktemp("survives") / "run")))


PER_CLASS = 22


def work(run: RunDir, out: Path) -> list[object]:
    options = ["--steps", 4, "--per-class", PER_CLASS, "--batch-size", 4, "--set", "generate.match_histogram=true"]
    return ["--run", run.path, *options, "--out", out]


def result(run: RunDir, out: Path) -> tuple[list, list, np.ndarray]:
    """Names, tallies and images of what is kept. No shard is left."""
    assert not shards(out) and not list(out.glob(".*.tmp"))
    kept = open_kept(out)
    names = list(zip(kept.labels.tolist(), kept.index.tolist(), strict=True))
    tallies = json.loads((out / "summary.json").read_text())["by_class"]
    return names, tallies, kept.take(np.arange(len(kept)))


def same(a, b) -> bool:
    return a[:2] == b[:2] and np.array_equal(a[2], b[2])


def shards(out: Path) -> int:
    return len(list(out.glob("shard-*.safetensors")))


def batches(out: Path) -> int:
    """How many batches a finished command drew."""
    return len(load_tensors(out / "candidates.safetensors")[0]["labels"]) // 4


def wait_for_shards(out: Path, count: int, process: int, told: Path) -> None:
    """Fails at once where the process, which its parent has not asked for yet, has ended before."""
    while shards(out) < count:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        assert state != "Z", told.read_text()[-3000:]
        time.sleep(0.002)


@pytest.fixture(scope="module")
def unbroken(run, nursery, tmp_path_factory):
    """What an unbroken command keeps, and where."""
    folder = tmp_path_factory.mktemp("unbroken")
    code, last = nursery.run(work(run, folder / "out"), folder / "told")
    assert code == 0, last
    return result(run, folder / "out"), folder / "out"


def test_killed_five_times_at_random_it_keeps_the_same(run, unbroken, nursery, tmp_path):
    """Each time a random number of batches on, and a random moment after: while starting, drawing, writing."""
    expected, whole = unbroken
    out, rng = tmp_path / "out", np.random.default_rng(0)
    assert batches(whole) > 5 * 5  # it cannot be done before it was killed so often
    for _ in range(5):
        process, more = nursery.start(work(run, out), tmp_path / "told"), int(rng.integers(0, 5))
        wait_for_shards(out, shards(out) + more, process, tmp_path / "told")
        time.sleep(rng.uniform(0, 0.02 if more else 0.3))
        os.kill(process, signal.SIGKILL)
        assert nursery.wait() == -signal.SIGKILL
    assert 0 < shards(out) < batches(whole)
    assert nursery.run(work(run, out), tmp_path / "told")[0] == 0
    assert same(result(run, out), expected)


def test_waiting_for_shards_of_a_command_that_has_ended_fails_with_what_it_printed(run, nursery, tmp_path):
    process = nursery.start([*work(run, tmp_path / "out"), "--sampler", "none"], tmp_path / "told")
    with pytest.raises(AssertionError, match="error: --sampler"):
        wait_for_shards(tmp_path / "out", 1, process, tmp_path / "told")
    assert nursery.wait() == 2


def test_interrupted_it_says_so_and_loses_nothing(run, unbroken, nursery, tmp_path):
    out, told = tmp_path / "out", tmp_path / "told"
    process = nursery.start(work(run, out), told)
    wait_for_shards(out, 3, process, told)
    os.kill(process, signal.SIGINT)
    assert nursery.wait() == 130
    text = told.read_text()
    assert (
        text.strip().splitlines()[-1] == "interrupted; the same command resumes from here" and "Traceback" not in text
    )
    there = {file: file.read_bytes() for file in out.glob("shard-*")}
    assert 3 <= len(there) < batches(unbroken[1]) and not list(out.glob(".*.tmp"))
    nursery.start(work(run, out), told, fatal="synthetic.beton")
    assert nursery.wait() == -signal.SIGKILL
    assert re.search(r"generate: resuming with [1-9]\d* of \d+ samples", told.read_text())
    assert all(file.read_bytes() == content for file, content in there.items())
    assert nursery.run(work(run, out), told)[0] == 0
    assert same(result(run, out), unbroken[0])


@pytest.mark.parametrize(
    "file",
    [
        "levels.safetensors", "manifest.json", "shard-000-000004.safetensors", "synthetic.beton",
        "candidates.safetensors", "grid.png", "summary.json",
    ],
)  # fmt: skip
def test_killed_at_any_file_it_writes_or_removes_it_ends_with_the_same(run, unbroken, nursery, tmp_path, file):
    out, told = tmp_path / "out", tmp_path / "told"
    nursery.start(work(run, out), told, fatal=file)
    assert nursery.wait() == -signal.SIGKILL
    assert nursery.run(work(run, out), told)[0] == 0
    assert same(result(run, out), unbroken[0])


def test_killed_while_shards_are_removed_it_is_finished(run, unbroken, nursery, tmp_path):
    out, told = tmp_path / "out", tmp_path / "told"
    nursery.start(work(run, out), told, fatal="synthetic.beton")
    assert nursery.wait() == -signal.SIGKILL
    nursery.start(work(run, out), told, fatal=sorted(out.glob("shard-*"))[5].name)
    assert nursery.wait() == -signal.SIGKILL
    assert 0 < shards(out) < batches(unbroken[1])
    written = (out / "synthetic.beton").stat().st_mtime_ns
    assert nursery.run(work(run, out), told)[0] == 0
    assert same(result(run, out), unbroken[0])
    assert (out / "synthetic.beton").stat().st_mtime_ns == written


def test_a_file_that_cannot_grow_ends_it_in_one_line_and_it_goes_on(run, unbroken, nursery, tmp_path):
    out, told = tmp_path / "out", tmp_path / "told"
    nursery.start(work(run, tmp_path / "shards"), told, fatal="synthetic.beton")
    nursery.wait()
    size = max(file.stat().st_size for file in (tmp_path / "shards").glob("shard-*"))
    nursery.start(work(run, out), told, fatal="shard-000-000000.safetensors")
    nursery.wait()  # what precedes the samples is there, and prints nothing more into `told`, which is limited as well
    code, last = nursery.run(work(run, out), told, file_size=size - 8)
    assert code == 2
    assert last.startswith(f"error: {out}/shard-000-") and "make room" in last
    assert shards(out) < batches(unbroken[1]) and not list(out.glob(".*.tmp"))
    assert nursery.run(work(run, out), told)[0] == 0
    assert same(result(run, out), unbroken[0])


def test_a_full_disk_ends_it_in_one_line_and_it_goes_on_with_room(run, unbroken, nursery, small_disk, tmp_path):
    out, told = small_disk / "out", tmp_path / "told"
    code, last = nursery.run(work(run, out), told)
    assert code == 2 and last.startswith("error: ") and "No space left" in last and "make room" in last
    kept = shards(out)
    assert 0 < kept < batches(unbroken[1]) and not list(out.glob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert nursery.run(work(run, out), told)[0] == 0
    assert same(result(run, out), unbroken[0])


def test_a_folder_that_cannot_be_written_is_named(run, nursery, tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    if not os.geteuid():  # root may write anywhere but where the system itself says no
        out = Path("/proc/samples")
    code, last = nursery.run(work(run, out), tmp_path / "told")
    assert code == 2 and last.startswith(f"error: {out}") and "choose another place" in last


def test_a_run_without_a_model_is_told_which_command_makes_it(run, nursery, tmp_path):
    (tmp_path / "new").mkdir()
    shutil.copy(run.path / "config.toml", tmp_path / "new")
    stages = {"pack": "pack", "extractor": "train_extractor", "diffusion": "train_diffusion"}
    for stage, verb in stages.items():
        before = sorted((tmp_path / "new").rglob("*"))
        code, last = nursery.run(["--run", tmp_path / "new", "--fast"], tmp_path / "told")
        assert code == 2 and last.endswith(f"run python -m diffult.{verb} --run {tmp_path / 'new'}")
        assert sorted((tmp_path / "new").rglob("*")) == before
        shutil.copytree(run.path / stage, tmp_path / "new" / stage)
    code, last = nursery.run(["--run", tmp_path / "none"], tmp_path / "told")
    assert code == 2 and "config.toml: not found; start a run with" in last and not (tmp_path / "none").exists()


def test_a_class_that_never_passes_ends_with_a_warning_and_all_else(run, nursery, tmp_path):
    """Exit code 0: what could be had is there, whole, and the summary says what is short."""
    hopeless = Path(shutil.copytree(run.path, tmp_path / "hopeless"))
    file = hopeless / "extractor" / "statistics.safetensors"
    statistics = load_file(file)
    statistics["radii"][:] = 1e9
    statistics["radii"][3] = 1e-9
    save_file(statistics, file)
    out = tmp_path / "out"
    arguments = ["--run", hopeless, "--steps", 2, "--per-class", 4, "--classes", "2-3", "--out", out]
    code, _ = nursery.run(arguments, tmp_path / "told")
    assert code == 0
    assert "class 3: only 0 of 4 samples after 12 candidates" in (tmp_path / "told").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["by_class"]["2"]["accepted"] == 4 and summary["by_class"]["3"]["accepted"] == 0
    files = {path: path.stat().st_mtime_ns for path in (out / "synthetic.beton", out / "candidates.safetensors")}
    assert nursery.run(arguments, tmp_path / "told")[0] == 0  # nor does it draw for ever when asked again
    assert {path: path.stat().st_mtime_ns for path in files} == files


# Draws 256 and 2560 images of 64 pixels with a network that costs nothing, each in a child of its own, to shards of
# 1 MiB, and prints the peaks of memory in KiB.
MEMORY = """
import os, sys
from pathlib import Path
import numpy as np, torch
from diffult.generation.config import GenerateConfig
from diffult.diffusion.schedule import Schedule
from diffult.generation import shards
from diffult.generation.fill import fill
from diffult.generation.sampler import Sampler
from diffult.longtail.filter import Filter
from diffult.longtail.quota import Quota

shards.SHARD_BYTES = 2**20

class Network(torch.nn.Module):
    def forward(self, x, t, labels):
        return x

class Passing(Filter):
    def judge(self, extractor, images, labels):
        return torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.uint8)

def child(count):
    settings = GenerateConfig(balance_to=0, steps=1, batch_size=32)
    sampler = Sampler(Network(), Schedule("cosine", 10), "v", settings, (3, 64, 64), 2, 0, torch.float32,
                      torch.device("cpu"))
    store = shards.ShardStore(Path(sys.argv[1]) / str(count), {})
    fill(sampler, None, store, Quota(np.array([count // 2] * 2), 1.0, Passing((0,))), ("a", "b"))

for count in (256, 2560):
    pid = os.fork()
    if pid == 0:
        child(count)
        os._exit(0)
    _, status, used = os.wait4(pid, 0)
    assert status == 0
    print(used.ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, ten_times = map(int, done.stdout.split())
    assert len(open_kept(tmp_path / "2560")) == 2560
    assert ten_times < 1.05 * peak, (peak, ten_times)
    more_images = (2560 - 256) * 64 * 64 * 3 / 1024
    assert ten_times - peak < more_images / 2  # so that it would show if they were held
