"""python -m ffcv_writers write | info | verify"""

from __future__ import annotations

import io
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm

from .decoding import limit_shorter_side
from .duplicates import duplicate_lines
from .encoding import Storage
from .errors import SourceError, counted
from .inspection import describe, verify
from .loader import available_cores
from .readers import LIST_FORMAT, READERS, Place, Split, guess_format, open_place, open_source
from .writing import write

_log = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)
UsageError: Any = typer.BadParameter.__base__  # its module differs between versions of typer
Files = Annotated[list[Path], typer.Argument(help="Files of the set, in order.", show_default=False)]
CORES = available_cores()
Workers = Annotated[int, typer.Option(min=1, help="Threads; default: one per processor.", show_default=False)]


@app.command("write", epilog=LIST_FORMAT)
def write_command(
    source: Annotated[Path, typer.Argument(help="Folder, list or archive of images.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="File to write, NAME.beton.", show_default=False)],
    format: Annotated[str | None, typer.Option(help=f"{', '.join(READERS)}; default: as it looks.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test, where the source has several.")] = "train",
    root: Annotated[Path | None, typer.Option(help="Where a list's paths start; default: its folder.")] = None,
    storage: Annotated[Storage, typer.Option(help="jpg: JPEG files that need no scaling lose nothing.")] = "raw",
    max_short_side: Annotated[int | None, typer.Option(min=1, help="Scale down to this shorter side.")] = None,
    workers: Workers = CORES,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="These are generated images; class folders may be empty.")
    ] = False,
) -> None:
    """Write the images of SOURCE to OUT, whole or not at all.

    Generated images go to a file of their own (--synthetic): a set is a list of files.
    """
    images = _open_split(source, format, split, root, synthetic)
    count, start = len(images.samples), time.perf_counter()
    with tqdm(total=count, unit="img", disable=None) as bar:
        digests = write(
            out,
            images.samples,
            labels=images.labels,
            synthetic=np.full(count, synthetic),
            index=np.arange(count),
            storage=storage,
            transform=None if max_short_side is None else partial(limit_shorter_side, size=max_short_side),
            workers=workers,
            progress=bar.update,
        )
    seconds = time.perf_counter() - start
    _warn(images, digests)
    size = out.stat().st_size / 1e6
    print(f"wrote {out}: {count} images, {size:.1f} MB, {seconds:.1f} s, {count / seconds:.0f} images/s")


def _warn(images: Split, digests: np.ndarray) -> None:
    """Warns of images that are there twice, and of labels in between that no image has."""
    name = getattr(images.samples, "name", "image {}".format)
    for line in duplicate_lines({"train": digests}, {"train": images.labels}, lambda _, number: name(number)):
        _log.warning("%s", line.removeprefix("train: "))
    absent = np.setdiff1d(np.arange(images.labels.max() + 1), images.labels)
    if absent.size:
        _log.warning(
            "no image has the label %d, of 0 to %d; %d are absent", absent[0], images.labels.max(), absent.size
        )


def _open_split(path: Path, format: str | None, split: str, root: Path | None, allow_empty: bool) -> Split:
    chosen = format or ("digits" if str(path) == "digits" else guess_format(path))
    if chosen == "list":
        source = open_source(chosen, root or path.parent, train_list=path)
        if not source.classes[0].isdecimal():
            shown = ", ".join(source.classes[:10]) + ", ..." * (len(source.classes) > 10)
            _log.warning("labels from 0 are the names in this list alone, sorted: %s", shown)
        return source.splits["train"]
    splits = open_place(chosen, Place(path, allow_empty=allow_empty)).splits
    if split not in splits:
        raise SourceError(f"{path} has no split {split!r}, only {', '.join(splits)}")
    return splits[split]


@app.command("info")
def info_command(files: Files) -> None:
    """Print what a set holds."""
    for name, value in describe(files).items():
        print(f"{name:>15}  {value}")


@app.command("verify")
def verify_command(
    files: Files,
    classes: Annotated[int | None, typer.Option(min=1, help="Labels must be 0 to N - 1, each there.")] = None,
    workers: Workers = CORES,
) -> None:
    """Decode every sample, check labels and names. Exit code 1 if anything is wrong."""
    wrong = verify(files, classes=classes, workers=workers)
    for line in wrong[:20]:
        print(line)
    if wrong:
        print(f"{counted(len(wrong), 'thing(s)')} wrong")
        raise typer.Exit(1)
    print(f"all {describe(files)['images']} samples can be read")


def main() -> None:
    """Exit code 0; 1 if `verify` found something; 2 after one line that says what is wrong; 130 when interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text; so does stderr
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except ValueError as error:
        message = str(error)
    except UsageError as error:
        message = f"{error.format_message()} (--help lists the options)"
    except OSError as error:
        message = f"{error.filename or 'file system'}: {error.strerror or error}"
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; nothing is left behind", file=sys.stderr)
        sys.exit(130)
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
