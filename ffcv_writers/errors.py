"""Errors of this package: one line that says what is wrong and where."""

from __future__ import annotations


class SourceError(ValueError):
    """A source cannot be read: a file is missing, damaged or of another format."""


class UnknownFormatError(SourceError):
    """A file whose format cannot be guessed."""


class SampleError(ValueError):
    """A sample cannot be read or decoded; the message names its file and its number."""


class CMYKError(ValueError):
    """A JPEG whose colours are CMYK or YCCK, which TurboJPEG does not turn into RGB."""


class ForeignError(ValueError):
    """A .beton with other fields than ours."""


def counted(count: int, what: str) -> str:
    """1 image, 3 images: `what` holds (s) where its plural has the s."""
    return f"{count} {what.replace('(s)', '' if count == 1 else 's')}"
