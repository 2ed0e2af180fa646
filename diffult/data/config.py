"""Settings of the image data: where the images come from and how long the tail is."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from diffult.strict_model import StrictModel

FASHION_MNIST_PATH = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts it


class DataConfig(StrictModel):
    """The `data` section of a configuration.

    Attributes:
        source: the format of the images. `digits` comes with scikit-learn; `idx` is the format of MNIST and
            its kin; `folder` is SPLIT/CLASS/FILE; `list` is text files with lines `relative/path label`.
        path: the folder (for CIFAR also the .tar.gz) of the images; `digits` needs none, `idx` without one
            reads Debian's Fashion-MNIST.
        train_list, val_list, test_list: the text files of `list`; `val_list` may be left out.
        image_size: height and width in pixels. Files are resized to it, the other sources must have it.
        channels: 1 (grey) or 3 (RGB); must be what the source gives.
        profile: how the training classes are thinned out, see `diffult.data.profiles`.
        n_max: images of the largest class under `exponential` and `step`; None takes the source's largest.
        imbalance: the imbalance factor n_max / n_min under `exponential` and `step`.
        counts: images per class, in label order, under `counts`.
        seed: of the draw of training and validation images; 0 with CIFAR is the published CIFAR-LT.
        val_per_class: validation images per class, where the source has no validation split of its own.
    """

    source: Literal["digits", "idx", "cifar10", "cifar100", "folder", "list"]
    path: str = ""
    train_list: str = ""
    val_list: str = ""
    test_list: str = ""
    image_size: int = Field(default=32, ge=1)
    channels: Literal[1, 3] = 3
    profile: Literal["exponential", "step", "counts", "natural"] = "natural"
    n_max: int | None = Field(default=None, ge=1)
    imbalance: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    counts: tuple[int, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**32)
    val_per_class: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_fields_together(self) -> Self:
        if self.source in ("cifar10", "cifar100", "folder", "list") and not self.path:
            raise ValueError(f"source '{self.source}' needs path, the place of its images")
        if self.source == "list" and not (self.train_list and self.test_list):
            raise ValueError("source 'list' needs train_list and test_list")
        if self.profile in ("exponential", "step") and self.imbalance is None:
            raise ValueError(f"profile '{self.profile}' needs imbalance, the ratio n_max / n_min")
        if self.profile == "counts" and not self.counts:
            raise ValueError("profile 'counts' needs counts, the number of images of each class")
        return self
