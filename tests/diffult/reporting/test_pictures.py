"""Strips and grids of samples, read back as PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_pages import enlarged, image_set

from diffult.reporting.pictures import evenly, image_column, image_strip, sample_grid


@pytest.mark.parametrize(("size", "channels", "factor"), [(8, 1, 8), (28, 1, 2), (32, 3, 2), (64, 3, 1)])
def test_grid_shows_each_sample_pixel_by_pixel(tmp_path: Path, size: int, channels: int, factor: int) -> None:
    samples = image_set(np.array([3, 0, 2]), ("a", "b", "c"), size, channels)
    sample_grid(samples, samples.classes, tmp_path / "grid.tmp", per_class=2)
    grid = np.asarray(Image.open(tmp_path / "grid.tmp"))
    tile = size * factor
    assert Image.open(tmp_path / "grid.tmp").format == "PNG"
    assert grid.shape[0] == 2 * tile + 2  # two rows: the class without a sample has none
    left = grid.shape[1] - (2 * tile + 2)
    for row, first in enumerate((0, 3)):
        for column in range(2):
            top, x = row * (tile + 2), left + column * (tile + 2)
            expected = enlarged(samples.image(first + column), factor)
            np.testing.assert_array_equal(grid[top : top + tile, x : x + tile], expected)
    assert (grid[:tile, :left] < 128).any()  # the name of the class is written there


def test_large_images_are_reduced() -> None:
    flat = np.full((256, 256, 3), (10, 200, 30), np.uint8)
    strip = image_strip([flat, flat, flat])
    assert strip.size == (3 * 64 + 2 * 2, 64)
    assert strip.getpixel((100, 30)) == (10, 200, 30)


def test_grid_of_many_classes_shows_an_even_choice(tmp_path: Path) -> None:
    samples = image_set(np.full(100, 1), tuple(f"class {i}" for i in range(100)))
    sample_grid(samples, samples.classes, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[0] == 40 * 66 - 2
    for row, label in ((0, 0), (39, 99)):
        tile = grid[row * 66 : row * 66 + 64, -64:]
        np.testing.assert_array_equal(tile, enlarged(samples.image(label), 8))


def test_even_choice() -> None:
    assert evenly(np.arange(9), 3).tolist() == [0, 4, 8]
    assert evenly(np.array([5, 7]), 40).tolist() == [5, 7]
    assert evenly(np.array([], np.int64), 40).tolist() == []


def test_grid_without_samples_says_so(tmp_path: Path) -> None:
    sample_grid(image_set(np.array([0]), ("a",)), ("a",), tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert (grid < 128).any() and grid.shape[0] == 64


def test_long_names_do_not_push_the_samples_away(tmp_path: Path) -> None:
    samples = image_set(np.array([1]), ("a very\nlong name " * 20,))
    sample_grid(samples, samples.classes, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width <= 160 + 16 + 64


def test_a_column_sets_images_one_above_the_other() -> None:
    images = image_set(np.array([2]), ("a",), 8, 3).images
    column = np.asarray(image_column(images))
    assert column.shape == (2 * 64 + 2, 64, 3)
    np.testing.assert_array_equal(column[66:], enlarged(images[1], 8))
