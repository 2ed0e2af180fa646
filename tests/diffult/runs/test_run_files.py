"""The files of a run, each on its own: permissions, what kills leave, checksums, and what any content leads to."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import mutated_bytes, mutated_document
from safetensors.torch import load, save_file

from diffult.engine.checkpoints import Checkpoints
from diffult.errors import DamagedError, UserError
from diffult.evaluate import copies_line, table
from diffult.generation.timesteps import read_trials
from diffult.longtail.extractor import load_extractor
from diffult.models.unet import load_unet
from diffult.report import write_report
from diffult.runs.files import (
    as_weights,
    atomic_write,
    load_state,
    load_tensors,
    lock_folder,
    metadata,
    read_json,
    read_lines,
    save_tensors,
    temporary_path,
    write_json,
    write_text,
)
from diffult.runs.records import check_classes, read_metrics
from diffult.runs.run_dir import RunDir

CPU = torch.device("cpu")


@pytest.fixture
def copied(tiny_run: RunDir, tmp_path: Path) -> RunDir:
    return RunDir.open(Path(shutil.copytree(tiny_run.path, tmp_path / "copy")))


def in_a_line(error: UserError) -> bool:
    return "\n" not in str(error) and len(str(error)) < 1000


# permissions: root may read everything, so the system's refusal is made here


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function after which a file can be opened no more."""
    real = Path.open

    def refuse(file: Path, number: int = errno.EACCES) -> None:
        def opened(path: Path, *options: Any, **named: Any) -> Any:
            if path == file:
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *options, **named)

        monkeypatch.setattr(Path, "open", opened)

    return refuse


@pytest.mark.parametrize("read", [load_tensors, metadata, load_state, read_json])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_a_file_that_cannot_be_read_is_neither_missing_nor_damaged(tmp_path, unreadable, read, number) -> None:
    file = tmp_path / "file"
    save_tensors(file, {"x": torch.ones(2)}, {})
    unreadable(file, number)
    with pytest.raises(OSError, match="file") as caught:
        read(file)
    assert caught.value.errno == number and file.exists()


def test_a_report_leaves_files_that_it_cannot_read_as_they_are(copied: RunDir, unreadable: Any) -> None:
    before = sorted(copied.path.rglob("*"))
    unreadable(copied.folder("generate") / "candidates.safetensors")
    with pytest.raises(PermissionError, match="candidates"):
        write_report(copied)
    assert sorted(copied.path.rglob("*")) == before


def test_a_file_that_cannot_be_written_is_called_by_its_name(tmp_path: Path) -> None:
    write_text(tmp_path / "full" / "file", "before")
    (tmp_path / "full" / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_text(tmp_path / "full" / "folder", "text")
    assert caught.value.filename == str(tmp_path / "full" / "folder")


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is a device or a pipe"):
        write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo() and [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_a_lock_of_someone_else_serves_who_may_only_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock_folder(tmp_path):
        pass
    real = Path.open

    def read_only(path: Path, mode: str = "r", *options: Any, **named: Any) -> Any:
        if path.name == ".lock" and mode != "rb":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, mode, *options, **named)

    monkeypatch.setattr(Path, "open", read_only)
    with lock_folder(tmp_path), pytest.raises(UserError, match="another process writes to it"), lock_folder(tmp_path):
        pass
    with pytest.raises(PermissionError), lock_folder(tmp_path / "new"):  # there is none to read
        pass


# what kills leave


def test_what_a_kill_left_goes_wherever_it_lies_and_nothing_else(copied: RunDir) -> None:
    places = [copied.path / name for name in ("config.toml", "report.html", "metrics.json", "pack", "evaluate/copies")]
    places += [copied.path / "generate" / name for name in ("synthetic.beton", "images/9/000.png", "wds/0.tar")]
    orphans = [place.with_name(f".{place.name}.{os.getpid() + 1}.tmp") for place in places]
    mine = [copied.path / name for name in (".notes.tmp", "a.7.tmp", ".gitignore", "generate/.x.7.tmp.gz")]
    elsewhere = copied.path / "generated" / ".lock"  # perhaps locked by another process, which is writing there
    running = copied.path / "generated" / ".synthetic.beton.7.tmp"
    for file in [*orphans, *mine, elsewhere, running]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    folder = temporary_path(copied.path / "classifier")
    (folder / "deep").mkdir(parents=True)
    gone = {*orphans, folder, folder / "deep"}
    before = sorted(file for file in copied.path.rglob("*") if file not in gone)
    with copied.lock():
        assert sorted(copied.path.rglob("*")) == before
    with lock_folder(elsewhere.parent):
        assert not running.exists()


# text


def test_any_name_is_written_and_read_as_utf_8(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"caf\udce9": "日本\u2028"})
    assert read_json(tmp_path / "file") == {"caf\udce9": "日本\u2028"}
    write_text(tmp_path / "file", "caf\udce9 é")
    assert (tmp_path / "file").read_bytes() == r"caf\udce9 é".encode()


@pytest.mark.parametrize("content", [b"[1]", b"\xff", b"{", b"[" * 99_999, b'{"a": ' + b"9" * 5000 + b"}", b""])
def test_what_is_no_json_object_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match=r"file.json: damaged; delete it"):
        read_json(tmp_path / "file.json")


# tensors

COLUMNS = {
    "labels": torch.arange(6), "distance": torch.linspace(0, 1, 6), "passed": torch.tensor([True, False] * 3),
    "images": torch.arange(3 * 16, dtype=torch.uint8).view(3, 4, 4, 1), "none": torch.empty(0, 3),
    "half": torch.ones(2, 2, dtype=torch.bfloat16).T, "one": torch.tensor(7).expand(1),
}  # fmt: skip
ABOUT = {"hash": "0123", "kept": "3"}


def saved(folder: Path) -> bytes:
    save_tensors(folder / "original", COLUMNS, ABOUT)
    return (folder / "original").read_bytes()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return saved(tmp_path_factory.mktemp("tensors"))


def test_tensors_come_back_as_they_were_and_others_read_them(tmp_path: Path) -> None:
    for tensors in (load_tensors((saved(tmp_path), tmp_path / "original")[1])[0], load(saved(tmp_path))):
        assert tensors.keys() == COLUMNS.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in COLUMNS.items())
    assert load_tensors(tmp_path / "original")[1] == ABOUT
    save_file({"x": torch.ones(2)}, tmp_path / "foreign")  # by another tool, or an earlier version
    assert load_tensors(tmp_path / "foreign")[0]["x"].tolist() == [1, 1]


@given(st.data())
def test_a_tensor_file_is_as_it_was_written_or_damaged(tmp_path: Path, original: bytes, data: st.DataObject) -> None:
    content = data.draw(mutated_bytes(original))
    (tmp_path / "file").write_bytes(content)
    try:
        tensors, about = load_tensors(tmp_path / "file")
    except DamagedError as error:
        assert in_a_line(error)
    else:
        assert tensors.keys() == COLUMNS.keys() and about == ABOUT
        assert all(torch.equal(tensors[name], tensor) for name, tensor in COLUMNS.items())
    assert isinstance(metadata(tmp_path / "file"), dict)


READERS = {
    "extractor": lambda run: load_extractor(run.folder("extractor"), CPU),
    "diffusion": lambda run: load_unet(run.folder("diffusion") / "ema.safetensors", CPU),
}


@pytest.mark.parametrize("network", READERS)
@pytest.mark.parametrize("drop", ["weight", "about"])
def test_weights_of_another_network_are_refused(copied: RunDir, network: str, drop: str) -> None:
    for file in (copied.folder("extractor") / "weights.safetensors", copied.folder("diffusion") / "ema.safetensors"):
        tensors, about = load_tensors(file)
        tensors.pop(min(tensors)) if drop == "weight" else about.pop("num_classes")
        save_tensors(file, tensors, about)
    with pytest.raises(DamagedError, match=r"not the weights of this network \(.*delete it to train again") as caught:
        READERS[network](copied)
    assert in_a_line(caught.value)


def test_short_memory_does_not_make_weights_those_of_another_network(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="allocate memory"), as_weights(tmp_path / "weights.safetensors"):
        torch.empty(2**60, dtype=torch.uint8)


@given(data=st.data())
def test_a_state_is_as_it_was_written_or_damaged(tmp_path: Path, data: st.DataObject) -> None:
    torch.save({"step": 3, "weight": torch.arange(5.0)}, tmp_path / "original")
    (tmp_path / "state.pt").write_bytes(data.draw(mutated_bytes((tmp_path / "original").read_bytes())))
    try:
        state = load_state(tmp_path / "state.pt")
    except DamagedError as error:
        assert in_a_line(error)
    else:
        assert state["step"] == 3 and torch.equal(state["weight"], torch.arange(5.0))


STATES = [{}, {"step": "x"}, {"step": 1, "model": {"weight": torch.ones(3)}}, {"step": 1, "model": 4}]


@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_of_something_else_is_damaged(tmp_path: Path, state: dict[str, Any]) -> None:
    torch.save({"config": "abc"} | state, tmp_path / "state.pt")
    with Checkpoints(tmp_path / "state.pt", "abc", {"model": torch.nn.Linear(2, 2)}) as checkpoints:
        with pytest.raises(
            DamagedError, match=r"state.pt: damaged checkpoint \(.*delete it to restart this stage"
        ) as caught:
            checkpoints.load()
        assert in_a_line(caught.value)
        checkpoints.save(3, 0.5)
        assert checkpoints.load() == (3, 0.5)


# records


def mutated_json(document: dict[str, Any]) -> st.SearchStrategy[bytes]:
    text = json.dumps(document).encode()
    return mutated_document(document).map(lambda changed: json.dumps(changed).encode()) | mutated_bytes(text)


@given(data=st.data())
@pytest.mark.parametrize("stage", ["pack", "generate", "classifier"])
def test_done_json_is_read_or_refused_in_a_line(
    tiny_run: RunDir, tmp_path: Path, stage: Any, data: st.DataObject
) -> None:
    run = RunDir(tmp_path / "run", tiny_run.config)
    if not (tmp_path / "run").exists():
        for other in ("pack", "generate", "classifier"):
            shutil.copytree(tiny_run.folder(other), run.folder(other), copy_function=os.link)
            (run.folder(other) / "done.json").unlink()
            shutil.copy(tiny_run.folder(other) / "done.json", run.folder(other))
    file = run.folder(stage) / "done.json"
    document = read_json(tiny_run.folder(stage) / "done.json")
    file.write_bytes(data.draw(mutated_json(document)))
    try:
        record = run.done(stage)
        if record is None:
            return
        assert record["seconds"] >= 0 and isinstance(record["files"], list)
        assert stage != "pack" or all(isinstance(record[key], dict) for key in ("held_out", "place"))
        assert stage != "generate" or record["generation"]["accepted"] >= 0
    except UserError as error:
        assert in_a_line(error) and str(file) in str(error)


METHODS = ("ce", "diffult")


@given(data=st.data())
def test_metrics_json_is_read_or_refused_in_a_line(tiny_run: RunDir, tmp_path: Path, data: st.DataObject) -> None:
    document = read_json(tiny_run.path / "metrics.json")
    file = tmp_path / "metrics.json"
    file.write_bytes(data.draw(mutated_json(document)))
    try:
        metrics = read_metrics(file, tiny_run.hash("evaluate"), METHODS)
        if metrics is None:
            return
        check_classes(metrics, tiny_run.packed().classes, file)
    except UserError as error:
        assert in_a_line(error)
    else:
        assert table(metrics) and (metrics.get("copies") is None or copies_line(metrics["copies"]))
        assert sum(metrics["seconds"].values()) >= 0
        assert all(np.isfinite(metrics[method]["top1"]) for method in METHODS)


PARTS = ["seconds", "generation", "seed", "name", "ce", "ce.top1", "generation.by_class", "generation.nfe"]


@pytest.mark.parametrize("key", PARTS)
def test_metrics_that_lack_something_are_named_with_the_command(copied: RunDir, key: str) -> None:
    file = copied.path / "metrics.json"
    metrics = read_json(file)
    *path, last = key.split(".")
    place = metrics
    for part in path:
        place = place[part]
    del place[last]
    write_json(file, metrics)
    with pytest.raises(UserError) as caught:
        write_report(copied)
    assert f"metrics.json: damaged ({key}: " in str(caught.value) and in_a_line(caught.value)
    assert f"delete it and run python -m diffult.evaluate --run {copied.path}" in str(caught.value)


@pytest.mark.parametrize("classes", [["0", "1"], list("012345678x"), list("0123456789a")])
def test_metrics_of_other_classes_are_refused(tiny_run: RunDir, classes: list[str]) -> None:
    metrics = read_json(tiny_run.path / "metrics.json")
    with pytest.raises(UserError, match="is not of the classes of this run"):
        check_classes(metrics, classes, Path("metrics.json"))


@given(data=st.data())
def test_tried_timesteps_are_read_or_refused_in_a_line(tmp_path: Path, data: st.DataObject) -> None:
    trials = [{"timesteps": [900, 300], "distance": 1.5}, {"timesteps": [800, 9], "distance": 2}]
    document = {"key": "k", "trials": trials}
    write_json(tmp_path / "timesteps.json", data.draw(mutated_document(document)))
    try:
        read = read_trials(tmp_path / "timesteps.json", "k")
    except UserError as error:
        assert in_a_line(error)
    else:
        assert all(isinstance(t, int) for timesteps in read for t in timesteps)
        assert all(isinstance(distance, float) for distance in read.values())


READINGS = [{"step": 50 * n, "images_per_s": 99.5, "loss": 1 / n, "held_out_loss": float("nan")} for n in (1, 2, 3)]


@given(mutated_bytes("".join(json.dumps(reading) + "\n" for reading in READINGS).encode()))
def test_readings_of_a_training_are_read_or_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    try:
        readings = read_lines(tmp_path / "metrics.jsonl")
    except UserError as error:
        assert in_a_line(error) and "line " in str(error)
    else:
        assert all(isinstance(value, int | float) for reading in readings for value in reading.values())
        assert all(reading.keys() >= {"step", "images_per_s"} for reading in readings)


def test_a_part_of_a_reading_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 50, "images_per_s": 9.5, "loss": 0.5}\n{"step": 100, "im')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 50, "images_per_s": 9.5, "loss": 0.5}]


def test_copies_are_told_where_only_some_classes_have_samples() -> None:
    assert "class b: 0.0 %" in copies_line({"share": 0.0, "by_class": {"a": None, "b": 0.0}, "expected": 5.0})


def test_a_report_of_a_run_that_is_being_written_to_is_refused(copied: RunDir, tmp_path: Path) -> None:
    with copied.lock():
        with pytest.raises(UserError, match="another process writes to it"):
            write_report(copied)
        assert write_report(copied, tmp_path / "out.html").exists()


def test_a_full_disk_is_named_by_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, atomic_write(tmp_path / "a.json"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.json") and not list(tmp_path.iterdir())
