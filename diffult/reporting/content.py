"""What the report of a run is made of, read from its folder. Files that are not there leave their part out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffult.config import Config
from diffult.reporting.pictures import Samples
from diffult.runs.files import load_tensors, read_lines

Tensors = Mapping[str, np.ndarray]
Curve = Sequence[Mapping[str, Any]]


class Images(Protocol):
    """What is read of `diffult.data.packing.Packed`."""

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def counts(self) -> np.ndarray: ...
    @property
    def train(self) -> Samples: ...


@dataclass
class RunContent:
    """A run as its report sees it.

    Attributes:
        metrics: the content of metrics.json.
        samples: the kept ones, with their `index`.
        machine: its description, one line.
        candidates: labels, indices, distance, verdict of every candidate.
        radii: float32 [num_classes], of the classes; empty if unknown.
        copies: of each kept sample "nearest", a training image, and the distances "pixels" and "features"; of
            held-out images "held_out_labels", "held_out_pixels", "held_out_features".
        predictions: "labels", and a method's class of each test image, by its name.
        trainings: the lines of each metrics file, by the name of what was trained.
    """

    config: Config
    metrics: Mapping[str, Any]
    packed: Images
    samples: Samples
    machine: str
    candidates: Tensors = field(default_factory=dict)
    radii: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    copies: Tensors = field(default_factory=dict)
    predictions: Tensors = field(default_factory=dict)
    trainings: Mapping[str, Curve] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Those with an accuracy, as in metrics.json."""
        return [name for name, row in self.metrics.items() if isinstance(row, Mapping) and "top1" in row]


def read_content(
    folder: Path, config: Config, metrics: Mapping[str, Any], packed: Images, samples: Samples, machine: str
) -> RunContent:
    """Everything else from the run's folder. Raises UserError where a file is damaged."""
    content = RunContent(config, metrics, packed, samples, machine)
    content.candidates = _tensors(folder / "generate" / "candidates.safetensors")
    content.radii = _tensors(folder / "extractor" / "statistics.safetensors").get("radii", content.radii)
    content.predictions = _tensors(folder / "evaluate" / "predictions.safetensors")
    copies = _tensors(folder / "evaluate" / "copies.safetensors")
    if len(copies.get("nearest", ())) == len(samples.labels):
        content.copies = copies
    files = {stage: folder / stage / "metrics.jsonl" for stage in ("extractor", "diffusion")}
    files |= {name: folder / "classifier" / f"{name}.metrics.jsonl" for name in content.methods}
    content.trainings = {name: lines for name, file in files.items() if file.exists() and (lines := read_lines(file))}
    return content


def _tensors(file: Path) -> Tensors:
    return {name: tensor.numpy() for name, tensor in load_tensors(file)[0].items()} if file.exists() else {}
