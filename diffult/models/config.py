"""Settings of the networks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffult.strict_model import StrictModel


class UNetConfig(StrictModel):
    """Shape of the diffusion UNet; see `diffult.models.unet.UNet`.

    Resolutions are in pixels of the feature map, that is after `patch`: a 28x28 image, patch 2, starts at 14.
    """

    channels: Annotated[int, Field(ge=4, le=2**14, multiple_of=4)]
    """Width of the first level."""
    multipliers: Annotated[tuple[Annotated[int, Field(ge=1, le=256)], ...], Field(min_length=1, max_length=16)]
    """Width of each level in units of `channels`; each level after the first halves the resolution."""
    num_res_blocks: Annotated[int, Field(ge=1, le=256)]
    """Residual blocks per level on the way down; the way up has one more."""
    attention_resolutions: tuple[int, ...]
    """Levels with self-attention after each block; the middle always has it."""
    head_width: Annotated[int, Field(ge=0)] = 0
    """Channels per attention head; 0: one head as wide as the level."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropout before the second convolution of a block."""
    scale_shift: bool = False
    """How a block takes the embedding. False: added (DDPM). True: scales and shifts its second norm (ADM)."""
    resample_in_block: bool = False
    """How resolutions change. False: a convolution (DDPM). True: inside a residual block (ADM)."""
    gradient_checkpointing: bool = False
    """Training keeps only the blocks' inputs and recomputes the rest in the backward pass (Chen et al., 2016)."""
    patch: Annotated[int, Field(ge=1)] = 1
    """Space-to-depth factor: patch x patch pixels are one position of the network."""
    augment_dim: Literal[0, 9] = 0
    """Length of the augmentation label of `diffult.diffusion.augment`; 0: the network takes none."""
