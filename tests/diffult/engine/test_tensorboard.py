"""TensorBoard's event files, read back by TensorBoard."""

import builtins
import json

import pytest

from diffult.engine.tensorboard import TensorBoardCallback
from diffult.errors import UserError
from diffult.train_diffusion import command


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_is_told_again_replaces_what_was_told_before(tmp_path):
    first = TensorBoardCallback(tmp_path)
    for step, loss in ((50, 1.0), (100, 0.5), (150, 9.0), (100, 0.25)):  # the loop has gone back
        first(step, {"loss": loss, "images_per_s": 100.0})
    second = TensorBoardCallback(tmp_path)  # killed; the checkpoint was that of step 50
    for step, loss in ((100, 0.375), (150, 0.125)):
        second(step, {"loss": loss, "images_per_s": 200.0})
    assert scalars(tmp_path)["loss"] == [(50, 1.0), (100, 0.375), (150, 0.125)]
    assert scalars(tmp_path)["images_per_s"] == [(50, 100.0), (100, 200.0), (150, 200.0)]


def test_the_command_writes_what_metrics_jsonl_holds(fresh):
    command(fresh.path, tensorboard=True)
    folder = fresh.folder("diffusion")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = scalars(folder / "tensorboard")
    assert set(told) == set(lines[0]) - {"step"}
    for name, curve in told.items():
        assert curve == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"--tensorboard needs .*pip install 'diffult\[tensorboard\]'"):
        TensorBoardCallback(tmp_path)
