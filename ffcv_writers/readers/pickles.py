"""Pickles of plain values and numpy arrays, as CIFAR's archives are, read without calling what they ask for.

numpy's functions and classes have stand-ins here, which gather what they are given and check it: no byte of a file
reaches numpy's own unpickling, which trusts it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import SourceError


def unpickle(content: bytes, where: str) -> dict[str, Any]:
    """The dictionary that a pickle holds, of Python 2 or 3 and of any protocol. Keys that are bytes become strings.

    Raises:
        SourceError: it is none, or asks for any other global than those of a numpy array of numbers, which is named.
    """
    try:
        for code, argument, _ in pickletools.genops(content):
            if code.name in ("PUT", "LONG_BINPUT") and (argument or 0) > len(content):
                raise pickle.UnpicklingError("a memo that would fill the memory")
        value = _plain(_Unpickler(content, where).load())
    except SourceError:
        raise
    except Exception as error:  # whatever arbitrary bytes lead to
        reason = str(error)[:80] if type(error) is pickle.UnpicklingError else type(error).__name__
        raise SourceError(f"{where} is not a CIFAR pickle ({reason}): fetch it again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{where} is not a CIFAR pickle (no dictionary): fetch it again")
    return value


class _Dtype:
    """In place of numpy.dtype: a boolean, integer or floating-point type."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or code not in _CODES:
            raise pickle.UnpicklingError(f"an array of type {code!r}")
        self.type = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.type = self.type.newbyteorder(state[1])


class _Array:
    """In place of numpy.ndarray."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, content = state
        self.value = _array(content, kind, shape, "F" if by_columns else "C").value


_CODES = {"b1", "f2", "f4", "f8", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))}


def _array(content: Any, kind: _Dtype, shape: tuple[int, ...], order: Any = "C", *_: Any) -> _Array:
    """In place of numpy's _frombuffer. `content` is a string where Python 2 wrote it."""
    if any(side < 0 for side in shape):
        raise pickle.UnpicklingError(f"an array of shape {shape}")
    array = _Array()
    raw = content.encode("latin1") if isinstance(content, str) else content
    array.value = np.frombuffer(raw, kind.type).reshape(shape, order=order)
    return array


def _scalar(kind: _Dtype, content: Any) -> Any:
    return _array(content, kind, (1,)).value[0].item()


def _encode(text: str, encoding: str = "") -> bytes:
    """In place of _codecs.encode, which wraps bytes in the older protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return text.encode("latin1")


_CORE = ("numpy.core", "numpy._core")  # the second since numpy 2
_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    **{(f"{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in _CORE},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _CORE},
    **{(f"{core}.numeric", "_frombuffer"): _array for core in _CORE},
    ("numpy", "ndarray"): lambda *_: _Array(),
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """Looks no global up: gives the stand-in of those that are known."""

    def __init__(self, content: bytes, where: str) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")  # Python 2 strings, array bytes among them
        self._where = where

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _STAND_INS:
            name = f"{module_name}.{global_name}"
            raise SourceError(f"{self._where} asks for {name}, as no CIFAR archive does: do not trust it")
        stand_in = _STAND_INS[module_name, global_name]
        return lambda *arguments: stand_in(*arguments)  # anew each time, as a pickle can set attributes of what it gets


def _plain(value: Any) -> Any:
    """A dictionary with strings as keys, and arrays in it as numpy's."""
    if not isinstance(value, dict):
        return value
    named = ((key.decode("latin1") if isinstance(key, bytes) else key, item) for key, item in value.items())
    return {key: item.value if isinstance(item, _Array) else item for key, item in named}
