"""What packing says of a set: duplicates, bad files and how many, a validation split that is smaller than asked for."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffult.data.config import DataConfig
from diffult.data.packing import open_data, pack_images, read_packed
from diffult.data.splits import choose_splits
from diffult.data.survey import take_survey
from diffult.errors import UserError
from ffcv_writers.readers import Source, Split


def folder(root: Path, counts: tuple[int, ...] = (4, 3)) -> Path:
    """SPLIT/CLASS/N.png; every image is another."""
    for s, split in enumerate(("train", "test")):
        for label, count in enumerate(counts):
            (root / split / "abc"[label]).mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (8, 8), (s, label, n)).save(root / split / "abc"[label] / f"{n}.png")
    return root


def config_of(root: Path, **settings: Any) -> DataConfig:
    return DataConfig(source="folder", path=str(root), image_size=8, **settings)


def pack(root: Path, out: Path) -> None:
    config = config_of(root)
    pack_images(config, open_data(config), out)


def test_duplicates_are_warned_of_with_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path / "set")
    pack(root, tmp_path / "pack")
    assert not caplog.records
    shutil.copy(root / "train" / "a" / "0.png", root / "train" / "a" / "copy.png")
    Image.open(root / "train" / "a" / "1.png").save(root / "train" / "b" / "other label.bmp")  # the same pixels
    for n in range(2):
        shutil.copy(root / "train" / "b" / f"{n}.png", root / "test" / "b" / f"leak{n}.png")
    pack(root, tmp_path / "pack")
    within, across = (record.getMessage() for record in caplog.records)
    assert (
        within.startswith("train: 2 of 9 images repeat others of it, such as ") and "1 of them with another" in within
    )
    assert f"{root}/train/a/copy.png that is {root}/train/a/0.png" in within
    assert across.startswith("test: 2 of 9 images are in train too, such as ") and "too good" in across


def test_every_bad_file_is_counted_and_some_are_named(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", (8, 3))
    for n in (1, 3, 4, 6, 7):
        (root / "train" / "a" / f"{n}.png").write_bytes(b"<html>" if n % 2 else b"")
    with pytest.raises(UserError) as error:
        pack(root, tmp_path / "pack")
    message = str(error.value)
    assert message.startswith("5 of 11 images cannot be read: ") and message.endswith(
        "; ...; repair or remove the file"
    )
    assert (
        message.count(".png) could not be read: ") == 3 and "a/4.png) could not be read: the file is empty" in message
    )
    assert not list((tmp_path / "pack").iterdir())


def test_a_file_that_is_gone_is_not_called_damaged(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    config = config_of(root)
    source = open_data(config)
    (root / "train" / "a" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png\) could not be read: No such file or directory; see that it is there"):
        pack_images(config, source, tmp_path / "pack")


def test_packed_images_that_may_not_be_read_are_not_called_damaged(tmp_path: Path) -> None:
    pack(folder(tmp_path / "set"), tmp_path / "pack")
    (tmp_path / "pack" / "train.beton").chmod(0)
    program = "import sys; from pathlib import Path; from diffult.data.packing import *; read_packed(Path(sys.argv[1]))"
    words = [sys.executable, "-c", program, str(tmp_path / "pack")]
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    command = words if os.geteuid() else [*drop, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stderr.endswith(f"UserError: cannot read {tmp_path}/pack/train.beton: Permission denied\n")
    (tmp_path / "pack" / "train.beton").chmod(0o644)
    assert read_packed(tmp_path / "pack").counts.tolist() == [4, 3]


def test_a_validation_split_smaller_than_asked_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.repeat([0, 1, 2], [100, 35, 9])
    split = Split(np.zeros((len(labels), 2, 2, 1), np.uint8), labels)
    source = Source({}, lambda: ({"train": split, "test": split}, ("a", "b", "c")))
    with caplog.at_level(logging.WARNING):
        choose_splits(DataConfig(source="digits", val_per_class=5), source)
    assert "no validation image is left for 1 of 3 classes: c" in caplog.text
    assert (
        "fewer than 5 validation images, as a class gives what it can spare, for 1 of 3 classes: b (3)" in caplog.text
    )


def test_a_survey_counts_what_it_cannot_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path / "set")
    for n in (0, 2):
        (root / "train" / "a" / f"{n}.png").write_bytes(b"")
    assert take_survey(root).counts.tolist() == [4, 3]
    named = f"such as {root}/train/a/0.png: not an image in a known format"
    assert f"2 of the 7 images looked at cannot be read, {named}" in caplog.text
