"""Settings of the image data: where the images come from, how they are stored, and how long the tail is."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from diffult.strict_model import StrictModel
from ffcv_writers import CenterCrop
from ffcv_writers.readers import READERS

FASHION_MNIST_PATH = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts it


class DataConfig(StrictModel):
    """The `data` section of a configuration.

    Attributes:
        source: the format of the images, see `ffcv_writers.readers.open_source`.
        path: the folder (for CIFAR also the .tar.gz) of the images; `digits` needs none, `idx` without one reads
            Debian's Fashion-MNIST.
        train_list, val_list, test_list: the text files of `list`, see `ffcv_writers.readers.LIST_FORMAT`; `val_list` is
            optional.
        storage: `raw`: image_size x image_size pixels. `jpg`: the networks take crops of images of up to
            max_short_side pixels on the shorter side; larger images are scaled down, JPEG files up to it lose nothing.
        image_size: height and width in pixels. Files are resized to it, arrays must have it.
        channels: 1 (grey) or 3 (RGB). Arrays must have as many, image files are converted, `jpg` needs 3.
        profile: how the training classes are thinned out, see `diffult.data.profiles`.
        n_max: images of the largest class under `exponential` and `step`; default: the source's largest. Under
            `natural` the most of any class; default: all.
        imbalance: n_max / n_min under `exponential` and `step`.
        counts: images per class, in label order, under `counts`.
        seed: of the draw of training, validation and test images; 0 with CIFAR is the published CIFAR-LT.
        val_per_class: validation images per class, where the source has no validation split of its own.
        test_share: of each class of three images or more, at least one image, for the test split, where the source has
            none of its own.
    """

    source: str
    path: str = ""
    train_list: str = ""
    val_list: str = ""
    test_list: str = ""
    storage: Literal["raw", "jpg"] = "raw"
    max_short_side: int = Field(default=400, ge=1)
    image_size: int = Field(default=32, ge=1)
    channels: Literal[1, 3] = 3
    profile: Literal["exponential", "step", "counts", "natural"] = "natural"
    n_max: int | None = Field(default=None, ge=1)
    imbalance: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    counts: tuple[int, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**32)
    val_per_class: int = Field(default=0, ge=0)
    test_share: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_fields_together(self) -> Self:
        if self.source not in READERS:
            raise ValueError(f"unknown source {self.source!r}: choose one of {', '.join(READERS)}")
        if self.source not in ("digits", "idx") and not self.path:
            raise ValueError(f"source '{self.source}' needs path, the place of its images")
        if self.source == "list" and not (self.train_list and (self.test_list or self.test_share)):
            raise ValueError("source 'list' needs train_list, and test_list or test_share")
        if self.storage == "jpg" and (self.channels == 1 or self.max_short_side < self.image_size):
            raise ValueError("storage 'jpg' needs channels = 3 and max_short_side of image_size or more")
        if self.profile in ("exponential", "step") and self.imbalance is None:
            raise ValueError(f"profile '{self.profile}' needs imbalance, the ratio n_max / n_min")
        if self.profile == "counts" and not self.counts:
            raise ValueError("profile 'counts' needs counts, the number of images of each class")
        return self

    def view(self, size: int, share: float = 1.0) -> CenterCrop | None:
        """The loader's crop for a network of `size` pixels: the middle `share` of the shorter side; None if raw."""
        return None if self.storage == "raw" else CenterCrop(size, share)
