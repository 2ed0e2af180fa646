"""A finished run at a tiny size, made once for all tests that need one; Triton's interpreter where there is no GPU."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Read when torch is imported, here and by every command that a test starts: at these sizes one thread is no slower, and
# sums of several threads may differ by rounding between processes, where tests ask for equal bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined: before `kernels` is imported

from diffult.run import run_pipeline
from diffult.runs.run_dir import RunDir
from kernels import dispatch

TINY = [
    "extractor.steps=12",
    "diffusion.steps=6",
    "diffusion.batch_size=8",
    "diffusion.checkpoint_every=3",
    "diffusion.cbdm=true",
    "diffusion.aid=true",
    "unet.channels=8",
    "generate.balance_to=10",
    "generate.steps=2",
    "generate.batch_size=8",
    "generate.max_draws=3",
    "generate.filter=distance",  # a hardly trained extractor sees no classes in hardly trained samples
    "generate.start=noise",
    "generate.match_histogram=false",  # samples are as the networks draw them
    "classifier.steps=8",
    "classifier.methods=['ce', 'diffult']",
    "data.val_per_class=5",
]


FUZZ = 25


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz",
        type=int,
        default=FUZZ,
        metavar="N",
        help=f"examples of each property, other ones each time ({FUZZ}, the same ones)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis runs the same few examples each time, or N random ones with --fuzz N, whatever the machine's load."""
    examples = config.getoption("--fuzz")
    checks = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
    hypothesis.settings.register_profile(
        "fuzz", max_examples=examples, deadline=None, derandomize=examples == FUZZ, suppress_health_check=checks
    )
    hypothesis.settings.load_profile("fuzz")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu skip where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """ffcv sets torch's number of threads when it is imported and used; sums over threads round by their number."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """digits-lt with a handful of steps a stage, run to its report."""
    run = RunDir.open(tmp_path_factory.mktemp("runs") / "tiny", "digits-lt", TINY)
    run_pipeline(run)
    return run


@pytest.fixture
def fresh(tiny_run, tmp_path) -> RunDir:
    """The tiny run before its diffusion stage."""
    for stage in ("pack", "extractor"):
        shutil.copytree(tiny_run.path / stage, tmp_path / "run" / stage)
    shutil.copy(tiny_run.path / "config.toml", tmp_path / "run")
    return RunDir.open(tmp_path / "run")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images beside the checkout, where they are there."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    return folder


@pytest.fixture
def triton_kernels() -> Iterator[torch.device]:
    """Triton serves every operation: on the GPU where there is one, else interpreted on the CPU. Yields the device."""
    before = dispatch.mode()
    dispatch.set_mode("triton")
    yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dispatch.set_mode(before)


@pytest.fixture
def front_end_alone(monkeypatch) -> None:
    """torch.compile traces into one graph, which runs as it is: nothing is handed to a back end."""
    torch._dynamo.reset()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="eager", fullgraph=True, **options))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)  # a failed test may still hold a file open
