"""The synthetic set of a run: how many samples each class needs, where they lie, and which are kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from diffult.config import GenerateConfig
from diffult.errors import UserError
from diffult.generation.shards import KeptSamples, ShardStore
from diffult.longtail.quota import Quota
from diffult.runs.files import load_tensors
from diffult.runs.run_dir import RunDir


def quotas_to(target: int, counts: np.ndarray) -> np.ndarray:
    """How many samples each class lacks to have `target` images, int64 [num_classes]."""
    return np.maximum(target - counts, 0)


def open_store(
    folder: Path, run: RunDir, settings: GenerateConfig, quotas: np.ndarray, seed: int, rank: int = 0
) -> ShardStore:
    """The shards in `folder`, refused where another model or other settings made them. The batch size is no part of
    what makes a sample, so it may change between attempts."""
    weights = {
        stage: _fingerprint(run.path / stage / file)
        for stage, file in (("diffusion", "ema.safetensors"), ("extractor", "weights.safetensors"))
    }
    sampling = settings.model_dump(mode="json", exclude={"batch_size", "balance_to"})
    return ShardStore(folder, weights | sampling | {"seed": seed, "quotas": quotas.tolist()}, rank)


def _fingerprint(weights: Path) -> str:
    """Of the tensors alone: the file's header orders its metadata anew at each writing."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_tensors(weights)[0].items()):
        digest.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def read_quota(store: ShardStore, settings: GenerateConfig, quotas: np.ndarray) -> Quota:
    """The ledger with the verdicts of all shards on disk."""
    quota = Quota(quotas, settings.max_draws, keep_ood=settings.filter == "none")
    for _, wave in store.waves():
        quota.record(wave.labels, wave.indices, wave.verdict)
    return quota


def kept_samples(store: ShardStore, quota: Quota) -> KeptSamples:
    """The accepted samples, read from disk as they are asked for."""
    return KeptSamples(store, [quota.kept(c) for c in range(len(quota.quotas))])


def run_samples(run: RunDir, counts: np.ndarray) -> KeptSamples:
    """The samples of the pipeline's own generation stage.

    Raises:
        UserError: the stage is not finished.
    """
    run.require("synthetic", "generate")
    settings, quotas = run.config.generate, quotas_to(run.config.generate.balance_to, counts)
    store = open_store(run.folder("synthetic"), run, settings, quotas, run.config.seed)
    quota = read_quota(store, settings, quotas)
    if run.done("synthetic") is None:  # a shard was found damaged and set aside just now
        raise UserError(f"{store.folder}: samples are damaged; run python -m diffult.generate --run {run.path} again")
    return kept_samples(store, quota)
