"""Image data: sources, long-tail profiles and the splits of a run."""

from diffult.data.config import DataConfig
from diffult.data.image_set import ArrayImages, FileImages, ImageSet
from diffult.data.splits import Data, load_data

__all__ = ["ArrayImages", "Data", "DataConfig", "FileImages", "ImageSet", "load_data"]
