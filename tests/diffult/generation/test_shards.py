"""Shards of candidates: few at any size, few files open at a time, and any content kept or set aside."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import mutated_bytes

from diffult.generation import shards
from diffult.generation.candidates import CandidateBatch
from diffult.generation.shards import ShardStore, open_kept
from diffult.longtail.quota import Quota
from diffult.runs.files import save_tensors


def batch(start: int, count: int = 4, size: int = 4) -> CandidateBatch:
    """Candidates of class 0 of which every second one passed; an image's pixels are its index."""
    indices = np.arange(start, start + count)
    passed = indices % 2 == 0
    images = np.broadcast_to(indices[passed, None, None, None].astype(np.uint8), (passed.sum(), size, size, 1))
    verdict = np.where(passed, 0, 2).astype(np.uint8)
    return CandidateBatch(0 * indices, indices, 0.5 * indices.astype(np.float32), verdict, passed, images.copy())


@pytest.mark.parametrize("gib", [1, 20, 200])
def test_any_amount_of_images_is_some_hundred_shards(tmp_path: Path, monkeypatch, gib: int) -> None:
    """A KiB here stands for 32 MiB, a batch for 8 MiB: 160 images of 128 pixels."""
    written: list[int] = []
    monkeypatch.setattr(shards, "SHARD_BYTES", 1024)
    monkeypatch.setattr(shards.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(shards, "save_tensors", lambda file, tensors, _: written.append(tensors["images"].nbytes))
    store = ShardStore(tmp_path, {})
    drawn = CandidateBatch(*[np.zeros(1, np.int64)] * 5, np.zeros((1, 256), np.uint8))
    for _ in range(gib * 2**30 // 2**23):
        store.add(drawn)
    assert len(written) < 700 and max(written) <= shards.LARGEST * 1024


@pytest.fixture
def few_files() -> Iterator[None]:
    """The process may open 40 files more than it has open, as few as no system allows."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 40, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_shards_than_files_may_be_open_are_joined(tmp_path: Path, monkeypatch, few_files: None) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 0)  # a shard for each batch
    quota, store = Quota(np.array([200]), 2.0), ShardStore(tmp_path, {})
    for number in range(100):
        drawn = batch(4 * number)
        store.add(drawn)
        quota.record(drawn.labels, drawn.indices, drawn.verdict)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 100
    again = Quota(np.array([200]), 2.0)
    ShardStore(tmp_path, {}).resume(again)
    assert again.accepted == quota.accepted == 200
    store.finish(again)
    kept = open_kept(tmp_path)
    assert kept.index.tolist() == list(range(0, 400, 2))
    assert [int(kept.image(i)[0, 0, 0]) for i in range(200)] == [i % 256 for i in range(0, 400, 2)]


def columns(drawn: CandidateBatch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(column) for name, column in vars(drawn).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The content of a shard."""
    file = tmp_path_factory.mktemp("shard") / "shard"
    save_tensors(file, columns(batch(0, 6)), {})
    return file.read_bytes()


@given(st.data())
def test_any_shard_is_as_it_was_written_or_set_aside(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    content = data.draw(mutated_bytes(whole))
    file = tmp_path / "shard-000-000000.safetensors"
    file.write_bytes(content)
    found = list(ShardStore(tmp_path, {}).shards())
    assert len(found) == file.exists()
    for _, shard in found:
        assert all(np.array_equal(getattr(shard, name), column) for name, column in vars(batch(0, 6)).items())
    if not found:
        assert file.with_suffix(".damaged").read_bytes() == content


@pytest.mark.parametrize("change", ["drop", "rename", "shorten", "images"])
def test_tensors_that_are_no_candidates_are_set_aside(tmp_path: Path, change: str) -> None:
    tensors = columns(batch(0))
    if change == "drop":
        del tensors["verdict"]
    elif change == "rename":
        tensors["label"] = tensors.pop("labels")
    elif change == "shorten":
        tensors["distance"] = tensors["distance"][1:]
    else:
        tensors["images"] = tensors["images"][1:]
    save_tensors(tmp_path / "shard-000-000000.safetensors", tensors, {})
    assert list(ShardStore(tmp_path, {}).shards()) == []
    assert (tmp_path / "shard-000-000000.damaged").exists()


def test_a_shard_that_cannot_be_read_stays_where_it_is(tmp_path: Path, monkeypatch, whole: bytes) -> None:
    def refuse(file: Path) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    file = tmp_path / "shard-000-000000.safetensors"
    file.write_bytes(whole)
    monkeypatch.setattr("diffult.runs.files._check_readable", refuse)
    with pytest.raises(PermissionError, match=r"shard-000-000000\.safetensors"):
        ShardStore(tmp_path, {}).resume(Quota(np.array([3]), 2.0))
    assert file.exists()
