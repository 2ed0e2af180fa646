"""From shards to .beton files of bounded size: killed at any step, nothing is lost, and the disk holds samples once."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from diffult.generation import shards
from diffult.generation.candidates import CandidateBatch
from diffult.generation.shards import ShardStore, kept_files, open_kept
from diffult.longtail.quota import Quota
from diffult.run import run_pipeline
from diffult.runs.files import load_tensors
from diffult.runs.run_dir import RunDir

QUOTAS, IMAGE = np.array([9, 0, 14, 4]), 4 * 4 * 3
FILES = [f"synthetic-{number:03d}.beton" for number in range(4)]  # of 8 images at most, 27 in all


def judged(labels: np.ndarray, indices: np.ndarray) -> CandidateBatch:
    """Two of three pass; an image's pixels are those of its name."""
    verdict = np.where(indices % 3 == 1, 2, indices % 2).astype(np.uint8)
    passed = verdict < 2
    names = zip(labels.tolist(), indices.tolist(), strict=True)
    images = np.array([np.random.default_rng(name).integers(0, 256, (4, 4, 3), np.uint8) for name in names])
    return CandidateBatch(labels, indices, 0.5 * indices.astype(np.float32), verdict, passed, images[passed])


def draw(folder: Path, rank: int = 0) -> tuple[ShardStore, Quota, int]:
    """Draws what is missing in batches of 5, a shard each; how many candidates that were."""
    quota, drawn = Quota(QUOTAS, 10.0), 0
    ShardStore(folder, {}).resume(quota)
    store = ShardStore(folder, {}, rank)
    while len((names := quota.next_batch(5))[0]):
        batch = judged(*names)
        quota.record(batch.labels, batch.indices, batch.verdict)
        store.add(batch)
        store.flush()
        drawn += len(batch.labels)
    return store, quota, drawn


def content(folder: Path) -> list[bytes]:
    """Of all files of a finished folder."""
    assert {file.name for file in folder.iterdir()} == {"manifest.json", "candidates.safetensors", *FILES}
    return [file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "candidates.safetensors"]


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished folder, and in tmp_path / "drawn" one with its shards."""
    monkeypatch.setattr(shards, "FILE_BYTES", 8 * IMAGE)
    store, quota, _ = draw(tmp_path / "drawn")
    shutil.copytree(tmp_path / "drawn", tmp_path / "whole")
    store.folder, store._candidates = tmp_path / "whole", tmp_path / "whole" / "candidates.safetensors"
    store.finish(quota)
    return tmp_path / "whole"


def test_the_files_together_are_the_kept_samples(whole: Path) -> None:
    samples, quota = open_kept(whole), Quota(QUOTAS, 10.0)
    ShardStore(whole, {}).resume(quota)
    labels, indices = quota.kept_names()
    assert [len(open_one.labels) for open_one in samples._files] == [8, 8, 8, 3]
    assert samples.labels.tolist() == labels.tolist() and samples.index.tolist() == indices.tolist()
    assert np.array_equal(samples.take(np.arange(27)), judged(labels, indices).images)
    table, about = load_tensors(whole / "candidates.safetensors")
    assert about == {"kept": "27", "files": "4"} and table["verdict"].dtype.itemsize == 1
    assert draw(whole)[2] == 0


def killing(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process dies before it renames or removes a file for so many times."""
    left = iter(range(step))

    def dying(function: Callable) -> Callable:
        def call(*arguments, **options):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))


def test_killed_at_any_step_it_goes_on_without_drawing(whole: Path, tmp_path: Path, monkeypatch) -> None:
    expected, step, killed = content(whole), 0, True
    while killed:
        folder = Path(shutil.copytree(tmp_path / "drawn", tmp_path / str(step)))
        store, quota, _ = draw(folder)
        with monkeypatch.context() as patch:
            killing(patch, step)
            try:
                store.finish(quota)
                killed = False
            except KeyboardInterrupt:
                step += 1
        for file in [*folder.glob(".*.tmp"), *folder.glob("*.partial")]:
            file.unlink()  # as when the folder is locked, and when the file is written again
        store, quota, drawn = draw(folder)
        assert drawn == 0
        store.finish(quota)
        assert content(folder) == expected
    assert step > 4 + 5


def test_the_disk_holds_the_samples_once_and_one_file_more(whole: Path, tmp_path: Path, monkeypatch) -> None:
    sizes, write = [], shards.write
    folder, (store, quota, _) = tmp_path / "drawn", draw(tmp_path / "drawn")
    passed = sum(len(shard.images) for _, shard in store.shards())

    def measured(*arguments, **options):
        write(*arguments, **options)
        sizes.append(sum(len(shard.images) for _, shard in store.shards()) + len(open_kept(folder)))

    monkeypatch.setattr(shards, "write", measured)
    store.finish(quota)
    assert len(sizes) == 4 and max(sizes) <= passed + 8 + 4  # and what is kept of the last shard but one


def test_what_is_damaged_half_way_is_drawn_again_and_no_more(whole: Path, tmp_path: Path, monkeypatch) -> None:
    folder, (store, quota, _) = tmp_path / "drawn", draw(tmp_path / "drawn")
    write = shards.write

    def dying(path: Path, *arguments, **options):
        if path.name == FILES[2]:
            raise KeyboardInterrupt
        return write(path, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write", dying)
        store.finish(quota)
    assert [file.name for file in kept_files(folder)] == FILES[:2]
    damaged = sorted(folder.glob("shard-*"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-5])
    store, quota, drawn = draw(folder, rank=1000)
    assert 0 < drawn < 25 and next(folder.glob("shard-1000-000000.safetensors"))
    store.finish(quota)
    damaged.with_suffix(".damaged").unlink()
    assert content(folder) == content(whole)


def test_damaged_files_do_not_count_when_it_is_killed_with_others_drawn(whole: Path, monkeypatch) -> None:
    """The second file damaged, and the table deleted as damaged: what was drawn again outlives a kill at any step."""
    expected = content(whole)
    damaged = Path(shutil.copytree(whole, whole.parent / "damaged"))
    (damaged / FILES[1]).write_bytes(b"")
    (damaged / "candidates.safetensors").unlink()
    draw(damaged)
    for step in range(8):
        folder = Path(shutil.copytree(damaged, whole.parent / f"damaged-{step}"))
        store, quota, _ = draw(folder)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            killing(patch, step)
            store.finish(quota)
        store, quota, drawn = draw(folder)
        assert drawn == 0
        store.finish(quota)
        for file in folder.glob(".*.tmp"):
            file.unlink()
        assert content(folder) == expected


@pytest.mark.parametrize("lost", [0, 1])
def test_a_file_that_is_gone_is_drawn_again(whole: Path, lost: int) -> None:
    expected = content(whole)
    (whole / FILES[lost]).unlink()
    store, quota, drawn = draw(whole)
    assert 27 - 8 * lost <= drawn < 60
    store.finish(quota)
    assert content(whole) == expected


def test_every_later_stage_reads_several_files(tiny_run: RunDir, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "FILE_BYTES", 64 * 5)
    run = RunDir.open(Path(shutil.copytree(tiny_run.path, tmp_path / "run")))
    for stage in ("generate", "classifier", "evaluate"):
        shutil.rmtree(run.folder(stage))
    run_pipeline(run)
    files = [file.name for file in kept_files(run.folder("generate"))]
    assert len(files) > 2 and files[0] == FILES[0] and set(files) < set(run.done("generate")["files"])
    one, several = (json.loads((path / "metrics.json").read_text()) for path in (tiny_run.path, run.path))
    assert {name: several[name] for name in ("ce", "diffult", "copies")} == {
        name: one[name] for name in ("ce", "diffult", "copies")
    }
    other = RunDir.open(tmp_path / "other", "digits-lt", TINY)
    other.share(run)
    assert other.done("generate") and [file.name for file in kept_files(other.folder("generate"))] == files
