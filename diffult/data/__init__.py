"""Image data: long-tail profiles, the splits of a run, and its packed images."""

from diffult.data.config import DataConfig
from diffult.data.packing import Packed, open_data, pack_images, read_packed, source_differences
from diffult.data.splits import choose_splits

__all__ = ["DataConfig", "Packed", "choose_splits", "open_data", "pack_images", "read_packed", "source_differences"]
