"""The race of loaders compares outputs before it times anything."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.loaders import check_large, check_small, checked, race
from diffult.errors import UserError
from ffcv_writers import RandomResizedCrop, open_set, write
from ffcv_writers.readers import open_source

needs_ffcv = pytest.mark.skipif(find_spec("ffcv") is None, reason="needs ffcv")


@needs_ffcv
@pytest.mark.parametrize("off", [0, 3])
def test_outputs_that_differ_are_refused(tmp_path: Path, off: int) -> None:
    """Files and set hold the same images, or those of the set are `off` levels brighter."""
    generator = np.random.default_rng(0)
    for name, size in (("small", 32), ("large", 300)):
        for number in range(40 if size == 32 else 4):
            path = tmp_path / name / str(number % 2) / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 250, (size, size, 3), dtype=np.uint8)).save(path)
        source = open_source("folder", tmp_path / name).splits["train"]
        images = [np.asarray(Image.open(path)) + np.uint8(off) for path in sorted((tmp_path / name).glob("*/*"))]
        labels = source.labels
        write(tmp_path / f"{name}.beton", images, labels=labels, synthetic=0 * labels, index=np.arange(len(labels)))
    small, large = (open_set([tmp_path / f"{name}.beton"]) for name in ("small", "large"))
    results = check_small(tmp_path / "small", small), check_large(tmp_path / "large", large, RandomResizedCrop(224, 0))
    for result in results:
        if off:
            with pytest.raises(UserError, match="outputs differ"):
                checked(result)
        else:
            assert checked(result)["images"] in (40, 4)


def test_a_ratio_is_the_median_of_epochs_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine slows down threefold in the middle: the ratio does not."""
    taken = iter([1.0, 0.5, 3.0, 1.5, 3.0, 1.5])
    monkeypatch.setattr("bench.loaders.seconds", lambda run: next(taken))
    result = race(100, {"torch": lambda: None, "ours": lambda: None}, "torch", 3)
    assert result == {
        "torch": {"images_per_s": 33.3, "times_torch": 1.0},
        "ours": {"images_per_s": 66.7, "times_torch": 2.0},
    }
