"""Extractor and classifiers trained by two processes: the same as by one, but for rounding."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

from diffult.engine.distributed import World
from diffult.errors import UserError
from diffult.run import run_pipeline
from diffult.runs.files import load_state, load_tensors
from diffult.runs.run_dir import RunDir
from diffult.train_classifier import train_classifier
from diffult.train_extractor import train_extractor

METHODS = ("ce", "diffult", "mix+logit_adjust", "crt")
SETTINGS = [
    *TINY,
    "precision=float32",
    "extractor.cutmix=0.3",
    "classifier.sam=0.05",
    "classifier.ema=0.8",
    "classifier.augment={pad=1, policy='randaugment', cutout=3}",
    "classifier.synthetic_share=0.25",  # a group of a whole batch, which is cut all the same
    "classifier.mixup=0.2",
    f"classifier.methods={list(METHODS)}",
]

# The gradients and running statistics of a deep residual network, in float64 by rank, beside those of the whole batch.
NETWORK = """
import sys, torch
from torch.nn.functional import cross_entropy
from diffult.engine.distributed import ALONE, init_distributed
from diffult.models.batch_norm import share_batch_norms
from diffult.models.resnet import build_classifier

def gradients(world):
    torch.manual_seed(0)
    model = build_classifier("resnet32", 10, 1, 8).double().train()
    images, labels = torch.randn(16, 1, 8, 8, dtype=torch.float64), torch.arange(16) % 10
    share_batch_norms(model, world)
    mine = world.local_slice(16, "batch")
    (cross_entropy(model(images[mine]), labels[mine], reduction="sum") / 16).backward()
    result = {name: parameter.grad for name, parameter in model.named_parameters()}
    for gradient in result.values():
        world.sum_(gradient)
    result |= dict(model.named_buffers())
    return result | {"logits": model.eval()(images).detach()}

world = init_distributed()
torch.save((gradients(ALONE), gradients(world)), f"{sys.argv[1]}/gradients-{world.rank}.pt")
"""

# Both commands in a first run; in a second one the classifiers' processes all stop as they begin step 5 of the last.
PROGRAM = """
import sys
from pathlib import Path
from diffult import train_classifier, train_extractor
from diffult.engine import loop

def seed_step(*key):
    seen.append(key)
    if len(seen) == 2 * 8 + 6:
        raise KeyboardInterrupt
    known(*key)

loop._LOG_EVERY = 1
whole, broken = map(Path, sys.argv[1:])
train_extractor.command(whole)
train_classifier.command(whole)
seen, known, loop.seed_step = [], loop.seed_step, seed_step
try:
    train_classifier.command(broken)
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffult.engine.loop._LOG_EVERY", 1)
        run_pipeline(RunDir.open(path, "digits-lt", SETTINGS), "classifier")
    return path


@pytest.fixture(scope="module")
def shared(alone, tmp_path_factory) -> tuple[Path, Path]:
    """Two runs whose classifiers two processes have trained: one to the end, with its extractor; one they left."""
    folder = tmp_path_factory.mktemp("shared")
    whole, broken = folder / "whole", folder / "broken"
    for run in (whole, broken):
        shutil.copytree(alone, run, ignore=shutil.ignore_patterns("classifier"))
    shutil.rmtree(whole / "extractor")
    assert in_two_processes(folder, PROGRAM, str(whole), str(broken)).count("stopped") == 2
    return whole, broken


def in_two_processes(folder: Path, program: str, *arguments: str) -> str:
    (folder / "program.py").write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "--", str(folder / "program.py"), *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


def losses(file: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


def assert_same(a: Path, b: Path, file: str) -> None:
    """Weights and running statistics, to the rounding of sums in another order, which training carries on."""
    (x, _), (y, _) = load_tensors(a / file), load_tensors(b / file)
    assert list(x) == list(y)
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=3e-3, atol=3e-3, msg=f"{file}: {name}")


def test_two_processes_train_the_extractor_as_one(alone, shared):
    a, b = (losses(path / "extractor" / "metrics.jsonl") for path in (alone, shared[0]))
    assert len(a) == 12 and b == pytest.approx(a, rel=1e-4)
    assert_same(alone, shared[0], "extractor/weights.safetensors")
    assert_same(alone, shared[0], "extractor/statistics.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_each_method_as_one(alone, shared, method):
    """Mixed images have the same partners, and the weights of a batch are summed over both halves."""
    a, b = (losses(path / "classifier" / f"{method}.metrics.jsonl") for path in (alone, shared[0]))
    assert len(a) == (1 if method == "crt" else 8)  # a head, 15 % of the steps
    assert b == pytest.approx(a, rel=1e-3)  # a rounding on the other side of a ReLU's kink makes some 1e-4
    assert_same(alone, shared[0], f"classifier/{method}.safetensors")


def test_one_process_resumes_where_two_stopped(alone, shared):
    broken = shared[1]
    assert load_state(broken / "classifier" / f"{METHODS[2]}.state.pt")["step"] == 4
    train_classifier(RunDir.open(broken))
    for method in METHODS:
        assert_same(alone, broken, f"classifier/{method}.safetensors")


def test_batch_norms_see_the_batch_of_all_processes(tmp_path):
    in_two_processes(tmp_path, NETWORK, str(tmp_path))
    for rank in (0, 1):
        whole, shared = torch.load(tmp_path / f"gradients-{rank}.pt")
        assert list(whole) == list(shared)
        for name in whole:
            torch.testing.assert_close(shared[name], whole[name], rtol=1e-8, atol=1e-10, msg=name)


def test_a_batch_that_processes_cannot_share_is_refused(alone):
    run = RunDir.open(alone)
    with pytest.raises(UserError, match=r"^extractor.batch_size = 64 cannot be shared by 3 processes"):
        train_extractor(run, World(0, 3))
    with pytest.raises(UserError, match=r"^classifier.batch_size = 64 cannot be shared by 3 processes"):
        train_classifier(run, World(0, 3))
