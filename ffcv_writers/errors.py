"""Errors that users of this package read: one line that says what is wrong and where."""

from __future__ import annotations


class SourceError(ValueError):
    """Images to be written cannot be read: a file is missing, damaged or of another format."""


class SampleError(ValueError):
    """A sample cannot be read or decoded; the message names its file and its number."""


class CMYKError(ValueError):
    """A JPEG of printing colours, CMYK or YCCK, which TurboJPEG does not turn into RGB."""
