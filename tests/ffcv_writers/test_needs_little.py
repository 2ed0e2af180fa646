"""What is not needed: ffcv and numba, and memory for sets that lie in the page cache."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ffcv_writers
from ffcv_writers import CenterCrop, Loader, open_set, write

ROOT = Path(ffcv_writers.__file__).parents[1]


def test_without_ffcv_pillow_serves_and_says_so(tmp_path: Path) -> None:
    """Raw files with numpy alone; JPEGs as ffcv's TurboJPEG gives them, CMYK and damage included."""
    program = """if True:
        import io, logging, os, sys
        logging.basicConfig(level=logging.WARNING)
        sys.modules["ffcv"] = sys.modules["numba"] = None  # as if they were not installed
        import numpy as np
        from PIL import Image
        from ffcv_writers import CenterCrop, Loader, open_set, write
        from ffcv_writers.jpeg import decoder_name
        os.chdir(sys.argv[1])
        images = np.arange(10 * 64, dtype=np.uint8).reshape(10, 8, 8, 1)
        names = np.arange(10)
        columns = dict(labels=names, synthetic=0 * names, index=names)
        write("raw.beton", images, **columns)
        batch = next(Loader(open_set(["raw.beton"]), 4).batches(names[::-1]))
        assert (batch.images.numpy() == images[9:5:-1]).all()
        print("raw is done", flush=True, file=sys.stderr)
        files = [open(name, "rb").read() for name in sys.argv[2:]]
        for storage in ("raw", "jpg"):
            name = f"{storage}-files.beton"
            write(name, files, **{key: value[: len(files)] for key, value in columns.items()}, storage=storage)
            shown = next(Loader(open_set([name], mixed_sizes=True), 9, crop=CenterCrop(48)).sequential()).images
            np.save(name, shown.numpy())
        try:
            write("broken.beton", [files[0][:2000]], labels=names[:1], synthetic=names[:1], index=names[:1])
        except ValueError as error:
            print(error)
        print(decoder_name())
    """
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((200, 150))
    picture.save(tmp_path / "a.jpg")
    picture.resize((100, 130)).convert("L").save(tmp_path / "b.jpg", progressive=True)
    picture.convert("CMYK").save(tmp_path / "c.jpg")
    picture.save(tmp_path / "d.png")
    files = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg", "d.png")]
    command = [sys.executable, "-c", program, str(tmp_path), *files]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr
    refused, decoder = done.stdout.splitlines()
    assert re.match(r"broken\.beton: sample 0 could not be read: .*truncated", refused)
    assert decoder.startswith("Pillow (")
    before, after = done.stderr.split("raw is done\n")
    assert "ffcv" not in before and after.count("Pillow decodes JPEGs") == 1 and after.count("without restart") == 1
    contents, names = [Path(file).read_bytes() for file in files], np.arange(4)
    for storage in ("raw", "jpg"):
        path = tmp_path / f"{storage}.beton"
        write(path, contents, labels=names, synthetic=0 * names, index=names, storage=storage)  # type: ignore[arg-type]
        for read in (path, tmp_path / f"{storage}-files.beton"):  # what either wrote, read here
            batch = next(Loader(open_set([read], mixed_sizes=True), 9, crop=CenterCrop(48)).sequential())
            np.testing.assert_array_equal(batch.images.numpy(), np.load(tmp_path / f"{storage}-files.beton.npy"))


def test_a_raw_set_on_a_cpu_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """2,000 images and 40,000: what the process itself holds (Linux's RssAnon) after an epoch in random order."""
    program = """if True:
        import sys
        from ffcv_writers import Loader, Natural, open_set
        image_set = open_set([sys.argv[1]])
        loader = Loader(image_set, 64)
        for draws in Natural(len(image_set)).steps(0, 64, 0, len(image_set) // 64):
            for batch in loader.batches(*draws):
                pass
        lines = open("/proc/self/status").read().splitlines()
        print(next(line.split()[1] for line in lines if line.startswith("RssAnon")), loader.resident)
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("RssAnon is Linux's")
    held = []
    for count in (2000, 40000):
        names = np.arange(count)
        images = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None], (count, 32, 32, 3))
        write(tmp_path / f"{count}.beton", images, labels=names, synthetic=0 * names, index=names)
        command = [sys.executable, "-c", program, str(tmp_path / f"{count}.beton")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=True)
        kilobytes, resident = done.stdout.split()
        held.append(int(kilobytes))
        assert resident == "False"
    assert held[1] - held[0] < 12_000  # the images are 117 MB more


def test_importing_the_package_does_not_import_ffcv() -> None:
    program = "import sys, ffcv_writers; assert 'ffcv' not in sys.modules and 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=180)
