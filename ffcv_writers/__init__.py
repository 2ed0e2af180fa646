"""Image sets on disk and batches of them: ffcv's .beton files, or .npz files in memory where ffcv is missing.

write(path, images, labels=..., synthetic=..., index=...)     one file or shards of it, whole or not at all
image_set = open_set([real, generated])                       several files as one set
loader = Loader(image_set, batch_size)
for draws in Ratio(image_set.synthetic, 96, 32).steps(seed, 128, start, stop, rank=rank, world=world):
    for batch in loader.batches(*draws): ...

On the command line: python -m ffcv_writers --help
"""

from .available import have_ffcv, suffix
from .crops import CenterCrop, Crop, RandomResizedCrop
from .errors import SampleError, SourceError
from .image_set import ImageSet
from .loader import Batch, Loader, open_set
from .memory import ArraySet
from .orders import ClassBalanced, Draws, Natural, Order, Ratio, Weighted, shard
from .writing import Samples, join, write

__all__ = [
    "ArraySet",
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
    "have_ffcv",
    "join",
    "open_set",
    "shard",
    "suffix",
    "write",
]
