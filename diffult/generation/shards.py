"""A generation run on disk: shards while it is drawn, one .beton and a table of all candidates when it is done.

    manifest.json             what determines the samples: weights, settings, seed, quotas
    shard-RANK-NUMBER...      candidates so far, with the images of those that passed
    synthetic.beton           the kept samples in the order (class, index); absent if none is kept
    candidates.safetensors    labels, indices, distance and verdict of every candidate; written last

Files are whole or absent. A killed run draws at most the last shard's samples again; shards are removed once
candidates.safetensors is on disk.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from diffult.errors import DamagedError, UserError
from diffult.generation.candidates import CandidateBatch
from diffult.generation.config import GenerateConfig
from diffult.longtail.quota import Quota
from diffult.runs.files import load_tensors, metadata, read_json, save_tensors, write_json
from ffcv_writers import ImageSet, open_set, write

log = logging.getLogger(__name__)

# A shard is written when its images have so many bytes and this share of those so far, or the last one is older than
# so many seconds and than this share of the time so far: small batches share a shard, and any run has some hundred.
SHARD_BYTES, SHARD_SECONDS, SHARD_SHARE = 32 * 2**20, 10.0, 0.01
LARGEST = 16  # times SHARD_BYTES, in memory at once
_COLUMNS = ("labels", "indices", "distance", "verdict", "passed", "images")


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
            raise UserError(
                f"{folder}: holds samples made otherwise ({key}: {before.get(key)}, now {manifest.get(key)}); "
                "choose another --out or delete the folder"
            )


def open_kept(folder: Path) -> ImageSet | None:
    """The kept samples of a finished run in the order (class, index), None if there are none. Raises UserError if the
    file is damaged."""
    file = folder / "synthetic.beton"
    try:
        return open_set([file]) if file.exists() else None
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
        if rank == 0:
            self._clean()

    def _clean(self) -> None:
        """Removes what an interrupted attempt left of its last steps."""
        if self.finished:
            self._remove_shards()
        else:
            self._candidates.unlink(missing_ok=True)  # verdicts on samples that are gone

    @property
    def finished(self) -> bool:
        """Whether the kept samples are all in synthetic.beton."""
        if not self._candidates.exists():
            return False
        return (self.folder / "synthetic.beton").exists() or metadata(self._candidates).get("kept") == "0"

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
            files = sorted(self.folder.glob(f"shard-{self.rank:03d}-*.safetensors"))
            number = int(files[-1].stem.rpartition("-")[2]) + 1 if files else 0
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
        """Records the verdicts on all candidates on disk."""
        if self.finished:
            table, _ = load_tensors(self._candidates)
            quota.record(*(table[name].numpy() for name in ("labels", "indices", "verdict")))
        else:
            for _, shard in self.shards():
                quota.record(shard.labels, shard.indices, shard.verdict)

    def finish(self, quota: Quota) -> None:
        """Writes synthetic.beton and candidates.safetensors and removes the shards; on one process, when every process
        has flushed. Raises UserError if a shard was damaged meanwhile, or the disk is full."""
        if self.finished:
            return
        kept, beton = KeptSamples(self, quota), self.folder / "synthetic.beton"
        if len(kept):
            write(beton, kept, labels=kept.labels, synthetic=np.ones_like(kept.labels), index=kept.indices)
        else:
            beton.unlink(missing_ok=True)
        save_tensors(self._candidates, self._table(), {"kept": str(len(kept))})
        self._remove_shards()

    def _table(self) -> dict[str, torch.Tensor]:
        """Of every candidate on disk, in the order (class, index)."""
        names = ("labels", "indices", "distance", "verdict")
        # Copies: a view would keep the whole shard in memory.
        columns = [[getattr(shard, name).copy() for name in names] for _, shard in self.shards()]
        if not columns:
            return {name: torch.empty(0) for name in names}
        table = dict(zip(names, map(np.concatenate, zip(*columns, strict=True)), strict=True))
        order = np.lexsort((table["indices"], table["labels"]))
        return {name: torch.from_numpy(column[order]) for name, column in table.items()}

    def _remove_shards(self) -> None:
        for file in self.folder.glob("shard-*.safetensors"):
            file.unlink()


class KeptSamples:
    """The kept samples in a store's shards, in the order (class, index), for `ffcv_writers.write`.

    `labels` and `indices` are int64 [N]; item i is uint8 [H, W, C], read on demand.
    """

    def __init__(self, store: ShardStore, quota: Quota) -> None:
        names = [(c, i) for c in range(len(quota.quotas)) for i in quota.kept(c)]
        wanted, place = set(names), dict[tuple[int, int], tuple[Path, int]]()
        for file, shard in store.shards():
            passed = zip(shard.labels[shard.passed].tolist(), shard.indices[shard.passed].tolist(), strict=True)
            place |= {name: (file, row) for row, name in enumerate(passed) if name in wanted}
        if len(place) < len(names):
            raise UserError(f"{store.folder}: samples are damaged; repeat the command to draw them again")
        self.labels = np.array([c for c, _ in names], dtype=np.int64)
        self.indices = np.array([i for _, i in names], dtype=np.int64)
        self._place = [place[name] for name in names]
        self._open: tuple[Path, Any] | None = None  # neighbours mostly share a shard

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int, /) -> np.ndarray:
        file, row = self._place[i]
        if self._open is None or self._open[0] != file:
            self._open = file, safe_open(file, framework="np").get_slice("images")
        return self._open[1][row]
