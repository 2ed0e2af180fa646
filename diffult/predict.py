"""The classes of any images, by a classifier of a run. They are read as the run's own images are packed and loaded, and
nothing is written into the run."""

from __future__ import annotations

import csv
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from tqdm import tqdm

from diffult.cli import RunOption, main
from diffult.data.config import DataConfig
from diffult.data.pixels import as_packed
from diffult.engine.device import compute_dtype, pick_device
from diffult.engine.distributed import init_distributed
from diffult.errors import UserError, one_of
from diffult.longtail.classification import EVALUATED, classify, evaluation_view
from diffult.longtail.methods import find_method
from diffult.models.resnet import load_classifier
from diffult.reporting.accuracy import ranked
from diffult.reporting.text import counted, readable
from diffult.runs.files import atomic_write
from diffult.runs.records import read_metrics
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import STAGES
from ffcv_writers import CenterCrop, available_cores
from ffcv_writers.readers.folder import images_below, in_words

log = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """A row of the table: the image, its most probable class, and how probable that is."""

    file: Path
    name: str
    probability: float


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Files as they are given, and of each folder all images below it, as the reader of class folders finds them; what
    is skipped is counted in a warning.

    Raises:
        UserError: nothing is there, or a folder without an image.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            skipped: Counter[str] = Counter()
            images = images_below(str(path), skipped)
            seen = f": {in_words(skipped)}" if skipped else ""
            if not images:
                raise UserError(f"{path}: holds no file that is named like an image{seen}")
            if skipped:
                log.warning("%s: skipped %s%s", path, counted(skipped.total(), "file", "files"), seen)
            files += map(Path, images)
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path}: {'a link that leads nowhere' if path.is_symlink() else 'does not exist'}")
    return files


def choose_method(run: RunDir, given: str | None = None) -> str:
    """The method that is given, else the one that the report names first: the best on the validation images, or on the
    test images where there are none.

    Raises:
        UserError: no such method in the run, or several and metrics.json damaged or not of the present settings.
    """
    methods, file = run.config.classifier.methods, run.path / "metrics.json"
    if given is not None:
        try:
            return one_of(methods, given)
        except ValueError as error:
            raise UserError(f"--method: {error}") from None
    if len(methods) == 1:
        return methods[0]
    metrics = read_metrics(file, run.hash("evaluate"), methods)
    if metrics is None:
        raise UserError(
            f"{file}: no accuracies of the present settings to choose a classifier by; give --method, one of "
            f"{', '.join(methods)}, or run python -m diffult.evaluate --run {run.path}"
        )
    return ranked(metrics, methods)[0]


def predict_files(run: RunDir, method: str, files: Sequence[Path]) -> Iterator[Prediction]:
    """Predictions in the order of the files, without those that cannot be read: a warning names each.

    Raises:
        UserError: the classifiers are not trained with the present settings, or the method's file is damaged.
    """
    run.require("classifier")
    data, device, classes = run.config.data, pick_device(), run.packed().classes
    model = load_classifier(run.folder("classifier") / f"{method}.safetensors", device)
    dtype = compute_dtype(run.config.precision, device)
    read = partial(_pixels, data, evaluation_view(data, model.image_size))
    with ThreadPoolExecutor(available_cores(), thread_name_prefix="decode") as pool:
        for start in range(0, len(files), EVALUATED):
            chosen = files[start : start + EVALUATED]
            pixels = zip(chosen, pool.map(read, chosen), strict=True)
            readable = [(file, image) for file, image in pixels if image is not None]
            if readable:
                images = torch.from_numpy(np.stack([image for _, image in readable])).to(device)
                columns = (column.tolist() for column in classify(model, images, dtype))
                for (file, _), label, probability in zip(readable, *columns, strict=True):
                    yield Prediction(file, classes[label], probability)


def _pixels(data: DataConfig, crop: CenterCrop | None, file: Path) -> np.ndarray | None:
    try:
        if not file.is_file():
            raise ValueError("not a file")  # reading a pipe would wait for ever
        return as_packed(data, file.read_bytes(), crop)
    except Exception as error:  # whatever arbitrary bytes lead to
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error or repr(error)
        log.warning("%s: cannot be read: %s", readable(str(file)), reason)
        return None


def _write_table(rows: Iterable[Prediction], out: Any, dialect: str) -> int:
    """Rows file, class, probability; returns their number."""
    writer, count = csv.writer(out, dialect, lineterminator="\n"), 0
    for row in rows:
        writer.writerow((readable(str(row.file)), readable(row.name), f"{row.probability:.4f}"))
        count += 1
    return count


def command(
    run: RunOption,
    images: Annotated[
        list[Path], typer.Argument(help="Image files, and folders: all images below.", show_default=False)
    ],
    method: Annotated[
        str | None,
        typer.Option(help="Whose classifier; default: the best on the validation images, as in the report."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write a CSV file with a header in place of printing.", show_default=False),
    ] = None,
) -> None:
    """Print file, class and probability of each image, tab-separated, by a classifier of a finished run.

    Images of any size are scaled and cropped as the run's own were. The run is only read. Exit code 2 if an image
    cannot be read, after all others are predicted.
    """
    world, run_dir = init_distributed(), RunDir.open(run)
    if run_dir.done("classifier") is None:
        stage = next(stage for stage in STAGES if run_dir.done(stage) is None)
        raise UserError(f"{run}: the run is not finished (at {stage}); python -m diffult.run --run {run} goes on")
    if world.is_main:
        files, chosen = find_images(images), choose_method(run_dir, method)
        hidden = True if output is None and sys.stdout.isatty() else None  # the table is progress enough
        rows = tqdm(
            predict_files(run_dir, chosen, files), "predict", len(files), unit="img", disable=hidden, dynamic_ncols=True
        )  # fmt: skip
        if output is None:
            count = _write_table(rows, sys.stdout, "excel-tab")
        else:
            with atomic_write(output) as temporary, temporary.open("w", encoding="utf-8", newline="") as out:
                out.write("file,class,probability\n")
                count = _write_table(rows, out, "excel")
        what = counted(count, "image", "images")
        log.info("%s by %s (%s)%s", what, chosen, find_method(chosen).title, f", in {output}" * bool(output))
        if count < len(files):
            raise UserError(f"{len(files) - count} of {len(files)} images could not be read, see above")
    world.barrier()


if __name__ == "__main__":
    main(command)
