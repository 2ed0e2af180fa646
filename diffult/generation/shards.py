"""Generated samples on disk: safetensors shards, a manifest that says what made them, and the kept set as an image set.

A shard holds one batch: for every candidate its label, index, distance and verdict, and the images of those that
passed. Shards are whole or absent, so whatever is there after a kill is good, and what is missing is drawn again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffult.errors import UserError
from diffult.runs.files import load_tensors, read_json, save_tensors, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CandidateBatch:
    """One batch of candidates.

    labels, indices: int64 [B]. distance: float32 [B] to the class centre. verdict: uint8 [B], `Verdict` values.
    passed: bool [B]. images: uint8 [passed.sum(), H, W, C], of those that passed, in order.
    """

    labels: np.ndarray
    indices: np.ndarray
    distance: np.ndarray
    verdict: np.ndarray
    passed: np.ndarray
    images: np.ndarray


class ShardStore:
    """The shards of one generation run in a folder."""

    def __init__(self, folder: Path, manifest: dict[str, Any], rank: int = 0) -> None:
        """Opens the folder, or starts it with this manifest.

        Args:
            rank: of the process that adds; each has its own numbers, so none waits for another.

        Raises:
            UserError: the folder holds samples made by another model or other settings.
        """
        self.folder, self.rank = folder, rank
        file = folder / "manifest.json"
        if file.exists():
            before = read_json(file)
            changed = [key for key in manifest | before if before.get(key) != manifest.get(key)]
            if changed:
                key = changed[0]
                raise UserError(
                    f"{folder}: holds samples made otherwise ({key}: {before.get(key)}, now {manifest.get(key)}); "
                    "choose another --out or delete the folder"
                )
        else:
            write_json(file, manifest)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.safetensors"))

    def add(self, wave: CandidateBatch) -> None:
        """Writes one shard."""
        files = sorted(self.folder.glob(f"shard-{self.rank:03d}-*.safetensors"))
        number = int(files[-1].stem.rpartition("-")[2]) + 1 if files else 0
        tensors = {
            name: torch.from_numpy(getattr(wave, name))
            for name in ("labels", "indices", "distance", "verdict", "passed", "images")
        }
        save_tensors(self.folder / f"shard-{self.rank:03d}-{number:06d}.safetensors", tensors, {})

    def waves(self) -> Iterator[tuple[Path, CandidateBatch]]:
        """Whole shards with their files, in order, one in memory at a time. A damaged one is named and set aside."""
        for file in self._files():
            try:
                tensors, _ = load_tensors(file)
            except UserError:
                aside = file.with_suffix(".damaged")
                file.rename(aside)
                log.warning("%s: damaged, set aside as %s; its samples are drawn again", file, aside.name)
                continue
            yield file, CandidateBatch(**{name: tensor.numpy() for name, tensor in tensors.items()})


class KeptSamples:
    """The kept samples of a store in the order (class, index), read shard by shard.

    `labels` and `indices` are int64 [N]; `read(i)` gives uint8 [H, W, C].
    """

    def __init__(self, store: ShardStore, kept: list[list[int]]) -> None:
        """
        Args:
            kept: for each class, the indices that are kept (`Quota.kept`).
        """
        wanted = {(c, i) for c, indices in enumerate(kept) for i in indices}
        place: dict[tuple[int, int], tuple[Path, int]] = {}
        for file, wave in store.waves():
            names = zip(wave.labels[wave.passed].tolist(), wave.indices[wave.passed].tolist(), strict=True)
            for row, name in enumerate(names):
                if name in wanted:
                    place.setdefault(name, (file, row))
        names_in_order = sorted(wanted)
        self.labels = np.array([c for c, _ in names_in_order], dtype=np.int64)
        self.indices = np.array([i for _, i in names_in_order], dtype=np.int64)
        self._place = [place[name] for name in names_in_order]
        self._open: tuple[Path, np.ndarray] | None = None  # neighbours mostly share a shard

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int, /) -> np.ndarray:
        return self.read(i)

    def read(self, i: int) -> np.ndarray:
        file, row = self._place[i]
        if self._open is None or self._open[0] != file:
            self._open = file, load_tensors(file)[0]["images"].numpy()
        return self._open[1][row]
