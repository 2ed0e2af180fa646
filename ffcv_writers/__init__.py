"""Image sets on disk and batches of them: ffcv's .beton files, written and read without ffcv.

write(path, images, labels=..., synthetic=..., index=...)     one file, whole or not at all
image_set = open_set([real, generated])                       several files as one set
loader = Loader(image_set, batch_size)
for draws in Ratio(image_set.synthetic, 96, 32).steps(seed, 128, start, stop, rank=rank, world=world):
    for batch in loader.batches(*draws): ...

Where images come from: `ffcv_writers.readers`. On the command line: python -m ffcv_writers --help
"""

from .crops import CenterCrop, Crop, RandomResizedCrop
from .errors import SampleError, SourceError
from .image_set import ImageSet, open_set
from .loader import Batch, Loader, available_cores, free_memory
from .orders import ClassBalanced, Draws, Natural, Order, Ratio, Weighted
from .writing import Samples, write

__all__ = [
    "Batch",
    "CenterCrop",
    "ClassBalanced",
    "Crop",
    "Draws",
    "ImageSet",
    "Loader",
    "Natural",
    "Order",
    "RandomResizedCrop",
    "Ratio",
    "SampleError",
    "Samples",
    "SourceError",
    "Weighted",
    "available_cores",
    "free_memory",
    "open_set",
    "write",
]
