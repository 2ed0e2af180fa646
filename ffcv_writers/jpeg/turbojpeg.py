"""JPEG to RGB by the TurboJPEG that ffcv links, the same bits as Pillow's, without holding Python's lock."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import threading
from pathlib import Path

import numpy as np

from ..decoding import check_size
from ..errors import CMYKError


def _load() -> ctypes.CDLL:
    spec = importlib.util.find_spec("ffcv")  # which does not import it
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in Path(folder).glob("_libffcv*"):
            return ctypes.CDLL(str(file))  # its symbols include those of the libraries that it links
    raise ImportError("No module named 'ffcv'" if spec is None else "ffcv has no library _libffcv")


lib = _load()

_RGB = 0  # TJPF_RGB
_CMYK = (3, 4)  # TJCS_CMYK, TJCS_YCCK
_ACCURATE_DCT = 4096  # TJFLAG_ACCURATEDCT, as Pillow

_int_pointer = ctypes.POINTER(ctypes.c_int)
lib.tjInitDecompress.restype = ctypes.c_void_p
lib.tjDestroy.argtypes = [ctypes.c_void_p]
lib.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
lib.tjGetErrorStr2.restype = ctypes.c_char_p
lib.tjDecompressHeader3.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, *4 * [_int_pointer]]
lib.tjDecompress2.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, *5 * [ctypes.c_int]]


class _Handle:
    """One thread's decompressor and memory for pixels."""

    def __init__(self) -> None:
        self.pointer = lib.tjInitDecompress()
        self._room = np.empty(0, np.uint8)

    def room(self, size: int) -> np.ndarray:
        """`size` bytes, the same memory each time: fresh pages cost a fifth of decoding a photograph."""
        if size > len(self._room):
            self._room = np.empty(size, np.uint8)
        return self._room[:size]

    def __del__(self) -> None:
        lib.tjDestroy(self.pointer)

    def check(self, code: int) -> None:
        if code:  # a header that failed stays in the handle and would be taken for the next file's
            del _of_thread.handle
            raise ValueError(lib.tjGetErrorStr2(self.pointer).decode(errors="replace"))


_of_thread = threading.local()


def decode_jpeg(content: np.ndarray, *, reuse_buffer: bool = False) -> np.ndarray:
    """See `ffcv_writers.jpeg.decode_jpeg`."""
    if not hasattr(_of_thread, "handle"):
        _of_thread.handle = _Handle()
    handle: _Handle = _of_thread.handle
    width, height, sampling, colours = (ctypes.c_int() for _ in range(4))
    file = (handle.pointer, content.ctypes.data, len(content))
    handle.check(lib.tjDecompressHeader3(*file, width, height, sampling, colours))
    if colours.value in _CMYK:
        raise CMYKError("its colours are CMYK")
    check_size(height.value, width.value)
    shape = height.value, width.value, 3
    pixels = handle.room(math.prod(shape)).reshape(shape) if reuse_buffer else np.empty(shape, np.uint8)
    handle.check(lib.tjDecompress2(*file, pixels.ctypes.data, width, 0, height, _RGB, _ACCURATE_DCT))
    return pixels
