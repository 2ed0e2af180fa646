"""Arrays in a .npz file: SPLIT_images and SPLIT_labels (as MedMNIST has them), or images and labels."""

from __future__ import annotations

import numpy as np

from ..errors import SourceError
from .source import SPLITS, Place, Source, Split, array_split, file_sizes, numbered


def read(place: Place) -> Source:
    """Classes are named by their labels."""
    path = place.path

    def content() -> tuple[dict[str, Split], tuple[str, ...]]:
        try:
            with np.load(path, allow_pickle=False) as file:
                named = {split: (f"{split}_images", f"{split}_labels") for split in SPLITS}
                named = {split: pair for split, pair in named.items() if {*pair} <= {*file.files}}
                named = named or {"train": ("images", "labels")}
                if not {*next(iter(named.values()))} <= {*file.files}:
                    raise SourceError(
                        f"{path} has no arrays images and labels, nor train_images and train_labels, "
                        f"but {', '.join(file.files)}"
                    )
                splits = {split: array_split(file[one], file[two], path) for split, (one, two) in named.items()}
        except SourceError:
            raise
        except (OSError, ValueError, EOFError) as error:
            raise SourceError(f"cannot read {path}: {error}") from error
        return splits, numbered(splits)

    return Source(file_sizes(path.parent, [path]), content)
