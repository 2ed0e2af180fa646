"""A generation run on disk: shards while it is drawn, then .beton files and a table of all candidates.

    manifest.json             what determines the samples: weights, settings, seed, quotas
    shard-RANK-NUMBER...      candidates so far, with the images of those that passed
    candidates.safetensors    labels, indices, distance and verdict of every candidate; written when all are drawn
    synthetic.beton           the kept samples in the order (class, index), raw, as they were judged; more than 4 GB are
                              in synthetic-000.beton, synthetic-001.beton ...; absent if none is kept

Files are whole or absent. A killed run draws at most the last shard's samples again. A shard goes as soon as the .beton
files have all that is kept of it, so that finishing takes the room of one file and some shards beside the samples.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from diffult.engine.progress import progress_bar
from diffult.errors import DamagedError, UserError
from diffult.generation.candidates import CandidateBatch
from diffult.generation.config import GenerateConfig
from diffult.longtail.quota import Quota
from diffult.reporting.text import shortened
from diffult.runs.files import load_tensors, metadata, read_json, save_tensors, write_json
from ffcv_writers import ImageSet, open_set, write

log = logging.getLogger(__name__)

# A shard is written when its images have so many bytes and this share of those so far, or the last one is older than
# so many seconds and than this share of the time so far: small batches share a shard, and any run has some hundred.
SHARD_BYTES, SHARD_SECONDS, SHARD_SHARE = 32 * 2**20, 10.0, 0.01
LARGEST = 16  # times SHARD_BYTES, in memory at once
FILE_BYTES = 4 * 10**9  # of the images in a .beton, which so has less than 4 GiB, at the most
_TABLE = ("labels", "indices", "distance", "verdict")
_COLUMNS = (*_TABLE, "passed", "images")

_ELSEWHERE = {"batch_size", "balance_to", "dose", "match_histogram"}  # in the quotas and the weights, or nowhere


def manifest(settings: GenerateConfig, quotas: np.ndarray, seed: int, weights: Mapping[str, Path]) -> dict[str, Any]:
    """What determines the samples; the batch size does not, and may change between attempts. weights: safetensors
    files by name, of the networks and of the levels that a histogram is matched by."""
    sampling = settings.model_dump(mode="json", exclude=_ELSEWHERE | settings.unread)
    fingerprints = {name: _fingerprint(file) for name, file in weights.items()}
    return fingerprints | sampling | {"seed": seed, "quotas": quotas.tolist()}


def _fingerprint(weights: Path) -> str:
    """Of the tensors alone: the order of metadata in the file's header is arbitrary."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_tensors(weights)[0].items()):
        digest.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_other(folder: Path, manifest: dict[str, Any], unknown: Mapping[str, str] | None = None) -> None:
    """Raises UserError if the folder holds samples that another manifest determines. unknown: why a value is not in
    this manifest yet, by key; any value that is there will do."""
    file = folder / "manifest.json"
    if not file.exists():
        return
    before = read_json(file)
    manifest = manifest | {key: before.get(key, why) for key, why in (unknown or {}).items()}
    for key in manifest | before:
        if before.get(key) != manifest.get(key):
            was, now = (shortened(str(values.get(key)), 60) for values in (before, manifest))
            raise UserError(
                f"{folder}: holds samples made otherwise ({key}: {was}, now {now}); "
                "choose another --out or delete the folder"
            )


def kept_files(folder: Path) -> list[Path]:
    """The .beton files of the kept samples, in order."""
    one = folder / "synthetic.beton"
    return [one] if one.exists() else sorted(folder.glob("synthetic-*.beton"))


def open_kept(folder: Path) -> ImageSet | None:
    """The kept samples of a finished run in the order (class, index), None if there are none. Raises UserError if a
    file is damaged."""
    files = kept_files(folder)
    try:
        return open_set(files) if files else None
    except ValueError as error:
        raise UserError(str(error)) from None


def _read(shard: Path) -> CandidateBatch:
    """Raises DamagedError if the file holds no candidates."""
    tensors, _ = load_tensors(shard)
    rows = {tensors[name].shape for name in _COLUMNS[:-1]} if tensors.keys() == set(_COLUMNS) else set()
    if len(rows) != 1 or tensors["images"].shape[:1] != (int(tensors["passed"].count_nonzero()),):
        raise DamagedError(f"{shard}: holds no candidates")
    return CandidateBatch(**{name: tensor.numpy() for name, tensor in tensors.items()})


class ShardStore:
    """The folder of one generation run.

    Args:
        rank: of the process that adds; each numbers its own shards, so none waits for another.

    Raises:
        UserError: the folder holds samples of another model or other settings.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self._candidates = folder / "candidates.safetensors"
        self._pending: list[CandidateBatch] = []
        self._opened = self._written = time.monotonic()
        self._bytes = 0  # of the images in this attempt's shards
        refuse_other(folder, manifest)
        if not (folder / "manifest.json").exists():
            write_json(folder / "manifest.json", manifest)

    @property
    def finished(self) -> bool:
        """Whether the kept samples are all in .beton files."""
        if not self._candidates.exists():
            return False
        about = metadata(self._candidates)
        return len(kept_files(self.folder)) >= int(about.get("files", about.get("kept") != "0"))

    def add(self, batch: CandidateBatch) -> None:
        """Takes a batch, which is written when the shard is large or old enough, or by `flush`."""
        self._pending.append(batch)
        now = time.monotonic()
        old = now - self._written >= max(SHARD_SECONDS, SHARD_SHARE * (now - self._opened))
        large = min(max(SHARD_BYTES, SHARD_SHARE * self._bytes), LARGEST * SHARD_BYTES)
        if old or sum(batch.images.nbytes for batch in self._pending) >= large:
            self.flush()

    def flush(self) -> None:
        """Writes the batches added since the last shard as one shard."""
        pending, self._pending = self._pending, []
        if pending:
            files = self.folder.glob(f"shard-{self.rank:03d}-*.safetensors")
            number = max((int(file.stem.rpartition("-")[2]) for file in files), default=-1) + 1
            tensors = {
                name: torch.from_numpy(np.concatenate([getattr(batch, name) for batch in pending])) for name in _COLUMNS
            }
            save_tensors(self.folder / f"shard-{self.rank:03d}-{number:06d}.safetensors", tensors, {})
            self._written = time.monotonic()
            self._bytes += tensors["images"].nbytes

    def shards(self) -> Iterator[tuple[Path, CandidateBatch]]:
        """Shards with their files in order, one in memory at a time. A damaged one is logged and set aside."""
        for file in sorted(self.folder.glob("shard-*.safetensors")):
            try:
                shard = _read(file)
            except DamagedError:
                aside = file.with_suffix(".damaged")
                file.rename(aside)
                log.warning("%s: damaged, set aside as %s; its samples are drawn again", file, aside.name)
                continue
            yield file, shard

    def resume(self, quota: Quota) -> None:
        """Records the verdicts on all candidates on disk, except where one passed and its image is lost. On one
        process, before others add."""
        if self.finished:
            self._remove_shards()
            before, _ = load_tensors(self._candidates)
            quota.record(*(before[name].numpy() for name in ("labels", "indices", "verdict")))
            return
        table, _ = self._collect()
        finished = [np.empty(0, np.int64), *(names for _, names in self._finished_files())]
        there = np.isin(_names(table["labels"], table["indices"]), np.concatenate(finished)) | (table["shard"] >= 0)
        rows = there | ~quota.filter.accepts(table["verdict"])
        quota.record(*(table[name][rows] for name in ("labels", "indices", "verdict")))

    def finish(self, quota: Quota) -> None:
        """Writes candidates.safetensors and the .beton files and removes the shards; on one process, when every process
        has flushed. Raises UserError if a shard was damaged meanwhile, or the disk is full."""
        if self.finished:
            return
        table, shards = self._collect()
        labels, indices = quota.kept_names()
        names, known = _names(labels, indices), _names(table["labels"], table["indices"])
        files, begin = list[Path](), 0
        for file, finished in self._finished_files():
            if not np.array_equal(finished, names[begin : begin + len(finished)]):
                break
            files.append(file)
            begin += len(finished)
        row = np.searchsorted(known, names[begin:])
        if not np.isin(names[begin:], known).all() or (table["shard"][row] < 0).any():
            raise UserError(f"{self.folder}: samples are damaged; repeat the command to draw them again")
        kept = KeptSamples(labels[begin:], indices[begin:], shards, table["shard"][row], table["row"][row])
        parts = kept.split(FILE_BYTES)
        about = {"kept": str(len(names)), "files": str(len(files) + len(parts))}
        for file in set(kept_files(self.folder)) - set(files):  # first: they count as soon as the table is there
            file.unlink()
        save_tensors(self._candidates, {name: torch.from_numpy(table[name]) for name in _TABLE}, about)
        with progress_bar(total=len(kept), desc="write", unit="img") as bar:
            for number, part in enumerate(parts):
                name = "synthetic.beton" if about["files"] == "1" else f"synthetic-{len(files) + number:03d}.beton"
                flag, path = np.ones_like(part.labels), self.folder / name
                write(path, part, labels=part.labels, synthetic=flag, index=part.indices, progress=bar.update)
                self._remove_shards({file for later in parts[number + 1 :] for file in later.shards})
        self._remove_shards()

    def _finished_files(self) -> Iterator[tuple[Path, np.ndarray]]:
        """The .beton files that are there, up to one that is missing or damaged, and the names of their samples."""
        for number, file in enumerate(kept_files(self.folder)):
            try:
                image_set = open_set([file])
            except ValueError:
                return
            if file.name not in ("synthetic.beton", f"synthetic-{number:03d}.beton"):
                return
            yield file, _names(image_set.labels, image_set.index)

    def _collect(self) -> tuple[dict[str, np.ndarray], list[Path]]:
        """Every candidate on disk in the order (class, index), and the shards: the columns of the table, and where the
        image is if it passed: `shard`, a place in the list of shards, -1 where that is gone, and `row` there."""
        types = (np.int64, np.int64, np.float32, np.uint8, np.int64, np.int64)
        columns, files = [[np.empty(0, type) for type in types]], list[Path]()
        for file, shard in self.shards():
            # Copies: a view would keep the whole shard in memory.
            own = [getattr(shard, name).copy() for name in _TABLE]
            columns.append([*own, np.full_like(own[0], len(files)), np.cumsum(shard.passed) - 1])
            files.append(file)
        if self._candidates.exists():
            before, _ = load_tensors(self._candidates)
            own = [before[name].numpy() for name in _TABLE]
            columns.append([*own, np.full(len(own[0]), -1), np.zeros(len(own[0]), np.int64)])
        joined = dict(zip((*_TABLE, "shard", "row"), map(np.concatenate, zip(*columns, strict=True)), strict=True))
        _, first = np.unique(_names(joined["labels"], joined["indices"]), return_index=True)
        return {name: column[first] for name, column in joined.items()}, files

    def _remove_shards(self, needed: Collection[Path] = ()) -> None:
        for file in set(self.folder.glob("shard-*.safetensors")) - set(needed):
            file.unlink()


def _names(labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """A number for each sample, int64, in the order (class, index)."""
    return (labels << 40) + indices


class KeptSamples:
    """Samples in shards, for `ffcv_writers.write`: item i is uint8 [H, W, C], read on demand.

    Args:
        labels, indices: int64 [N], their names.
        files: of the shards.
        shard, row: int64 [N], where each image is.
    """

    def __init__(
        self, labels: np.ndarray, indices: np.ndarray, files: list[Path], shard: np.ndarray, row: np.ndarray
    ) -> None:
        self.labels, self.indices = labels, indices
        self._files, self._shard, self._row = files, shard, row
        self._open: tuple[Path, Any] | None = None  # neighbours mostly share a shard

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int, /) -> np.ndarray:
        file = self._files[self._shard[i]]
        if self._open is None or self._open[0] != file:
            self._open = file, safe_open(file, framework="np").get_slice("images")
        return self._open[1][int(self._row[i])]

    @property
    def shards(self) -> set[Path]:
        """The files that hold them."""
        return {self._files[number] for number in np.unique(self._shard)}

    def split(self, most: int) -> list[KeptSamples]:
        """In order, in parts of at most so many bytes."""
        size = max(1, most // self[0].nbytes) if len(self) else 1
        parts = [slice(begin, begin + size) for begin in range(0, len(self), size)]
        columns = self.labels, self.indices, self._shard, self._row
        cut = ([column[part] for column in columns] for part in parts)
        return [KeptSamples(labels, indices, self._files, shard, row) for labels, indices, shard, row in cut]
