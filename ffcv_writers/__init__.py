"""Image sets on disk and batches of them: ffcv's .beton files, or .npz files in memory where ffcv is missing.

write(path, images, labels=..., synthetic=..., index=...)     one file, whole or not at all
image_set = open_set([real, generated])                       several files as one set
loader = Loader(image_set, batch_size)
for batch in loader.batches(stream_order("natural", image_set.labels, seed, start, count)): ...
"""

from .available import have_ffcv, suffix
from .image_set import ImageSet
from .loader import Batch, Loader, open_set
from .memory import ArraySet
from .orders import OrderKind, epoch_order, stream_chunks, stream_order
from .writing import Samples, write

__all__ = [
    "ArraySet",
    "Batch",
    "ImageSet",
    "Loader",
    "OrderKind",
    "Samples",
    "epoch_order",
    "have_ffcv",
    "open_set",
    "stream_chunks",
    "stream_order",
    "suffix",
    "write",
]
