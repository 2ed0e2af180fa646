"""ffcv's own loader in a process of its own.

Finalizers of what it compiles raise. Amid another test's `ast.parse` that is an error in Python before 3.11.8: pytest
formats the traceback, which calls `ast.parse` as well.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

_PROGRAM = """if True:
    import sys
    import numpy as np
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor
    path, out, batch_size, os_cache, size = *sys.argv[1:3], *map(int, sys.argv[3:])
    pipelines = {"image": [CenterCropRGBImageDecoder((size, size), 1.0), ToTensor()]} if size else {}
    loader = Loader(path, batch_size, num_workers=1, os_cache=bool(os_cache), drop_last=False, pipelines=pipelines)
    batches = [[field.numpy().copy() for field in batch] for batch in loader]
    np.savez(out, *map(np.concatenate, zip(*batches)))
"""


def read_by_ffcv(path: Path, batch_size: int, *, os_cache: bool = False, crop: int = 0) -> list[np.ndarray]:
    """Images, labels, synthetic and index of a whole file, in order. `crop`: side of a centre crop, 0 for none."""
    out = path.with_suffix(".npz")
    words = [str(path), str(out), str(batch_size), str(int(os_cache)), str(crop)]
    subprocess.run([sys.executable, "-c", _PROGRAM, *words], check=True, timeout=180)
    with np.load(out) as fields:
        return [fields[name] for name in fields.files]
