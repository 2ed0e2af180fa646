"""Settings of drawing."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from diffult.data.class_names import MOST_SAMPLES
from diffult.diffusion.samplers import SAMPLERS, SPACINGS, SigmaRange
from diffult.errors import one_of
from diffult.longtail.filter import FILTERS
from diffult.strict_model import StrictModel

SamplerName = Annotated[str, AfterValidator(partial(one_of, SAMPLERS))]
SpacingName = Annotated[str, AfterValidator(partial(one_of, SPACINGS))]
FilterName = Annotated[str, AfterValidator(partial(one_of, FILTERS))]

LARGEST_BATCH = 2**16


class GenerateConfig(StrictModel):
    """How many samples, and how they are drawn and judged."""

    balance_to: int = Field(ge=0, le=MOST_SAMPLES)  # N_t: a class with fewer real images is filled up to so many
    dose: float = Field(1.0, gt=0, le=1000)  # times the samples that a class lacks
    sampler: SamplerName = "ddpm"
    steps: int = Field(1000, ge=1)
    eta: float = Field(0.0, ge=0, le=1)  # ddim alone
    spacing: SpacingName = "time"  # of the steps: equal in time, in log-SNR, or in sigma^(1/rho) from max to min
    sigma_max: float = Field(80.0, gt=0)  # noise to signal, of spacing "sigma" alone, as are the next two
    sigma_min: float = Field(0.002, gt=0)
    rho: float = Field(7.0, gt=0)  # larger: closer together at the low end
    timesteps: tuple[int, ...] = ()  # falling, one for each of the steps, in place of the spacing; (): spaced
    # Lists of timesteps tried with the trained model before drawing, the spacing's first, for the one whose samples are
    # nearest to real images; 0: no search.
    search: int = Field(0, ge=0)
    # Samples get the pixel levels of the training images: see diffult.generation.levels.
    match_histogram: bool = False
    # What is denoised: noise alone, or a training image of another class with the first timestep's noise. See
    # diffult.generation.starts.
    start: Literal["noise", "other_classes"] = "noise"
    guidance: float = Field(0.0, ge=0, le=1000)  # w in eps + w (eps - eps_unconditional); 0: off
    batch_size: int = Field(64, ge=1, le=LARGEST_BATCH)
    # What is dropped: see diffult.longtail.filter.
    filter: FilterName = "distance"
    max_draws: float = Field(10.0, ge=1, le=1e6)  # candidates drawn for each sample needed, at the most

    @model_validator(mode="after")
    def _noise_falls(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min = {self.sigma_min} is not below sigma_max = {self.sigma_max}")
        if self.timesteps:
            if any(later >= t for t, later in pairwise(self.timesteps)) or self.timesteps[-1] < 0:
                raise ValueError(f"timesteps = {list(self.timesteps)} do not fall, or not to 0 or above")
            if len(self.timesteps) != self.steps:
                raise ValueError(
                    f"{len(self.timesteps)} timesteps, but steps = {self.steps}: set steps to {len(self.timesteps)}, "
                    "or timesteps to [] for spaced ones"
                )
            if self.search:
                raise ValueError(
                    f"timesteps are listed, but search = {self.search}: set search to 0 or timesteps to []"
                )
        return self

    @property
    def sigmas(self) -> SigmaRange:
        return SigmaRange(self.sigma_max, self.sigma_min, self.rho)

    @property
    def unread(self) -> set[str]:
        """Settings of the timesteps that play no part beside the others; a search lists them before any is drawn at."""
        listed = bool(self.timesteps or self.search)
        sigmas = set() if self.spacing == "sigma" and not listed else {"sigma_max", "sigma_min", "rho"}
        return sigmas | {"search", "spacing" if listed else "timesteps"}

    @property
    def evaluations(self) -> int:
        """Of the network for one sample; a step with guidance takes two."""
        return self.steps * (1 + (self.guidance > 0))
