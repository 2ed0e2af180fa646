"""python -m ffcv_writers write | info | verify | join"""

from __future__ import annotations

import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm

from .decoding import limit_longer_side
from .encoding import Storage
from .errors import SourceError
from .inspection import describe, verify
from .loader import available_cores
from .readers import READERS, Split, guess_format, open_source
from .writing import join, write

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)
UsageError: Any = typer.BadParameter.__base__  # its module differs between versions of typer
Files = Annotated[list[Path], typer.Argument(help="Files of the set, in order.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="File to write, NAME.beton.", show_default=False)]
Shards = Annotated[int, typer.Option(min=1, help="Files to write: NAME-00000-of-0000K.beton, ...")]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads; default: the processors.", show_default=False)]


@app.command("write")
def write_command(
    source: Annotated[Path, typer.Argument(help="Folder, list or archive of images.", show_default=False)],
    out: Out,
    format: Annotated[str | None, typer.Option(help=f"{', '.join(READERS)}; default: as it looks.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test, where the source has several.")] = "train",
    root: Annotated[Path | None, typer.Option(help="Where a list's paths start; default: its folder.")] = None,
    class_index: Annotated[Path | None, typer.Option(help="Labels of class folders: JSON, or a name a line.")] = None,
    storage: Annotated[Storage, typer.Option(help="smart: raw up to 64 KiB an image, larger ones jpg.")] = "raw",
    max_side: Annotated[int | None, typer.Option(min=1, help="Scale larger images down to this.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEGs that are encoded anew.")] = 95,
    workers: Workers = None,
    shards: Shards = 1,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="These are generated images.")] = False,
) -> None:
    """Write the images of SOURCE to OUT, whole or not at all.

    JPEG files that need not be scaled are stored with --storage jpg without loss. Generated images go to a file of
    their own (--synthetic): a set is a list of files, nothing real is written again.
    """
    images = _open_split(source, format, split, root, class_index)
    count, start = len(images.samples), time.perf_counter()
    with tqdm(total=count, unit="img", disable=None) as bar:
        files = write(
            out,
            images.samples,
            labels=images.labels,
            synthetic=np.full(count, synthetic),
            index=np.arange(count),
            storage=storage,
            quality=quality,
            transform=None if max_side is None else partial(limit_longer_side, size=max_side),
            workers=workers or available_cores(),
            shards=shards,
            progress=bar.update,
        )
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in files)
    names = str(files[0]) if len(files) == 1 else f"{files[0]} ... {files[-1].name}"
    print(f"wrote {names}: {count} images, {size / 1e6:.1f} MB, {seconds:.1f} s, {count / seconds:.0f} images/s")


def _open_split(path: Path, format: str | None, split: str, root: Path | None, class_index: Path | None) -> Split:
    chosen = format or ("digits" if str(path) == "digits" else guess_format(path))
    if chosen == "list":
        return open_source(chosen, root or path.parent, train_list=path).splits["train"]
    splits = open_source(chosen, path, class_index=class_index).splits
    if split not in splits:
        raise SourceError(f"{path} has the split(s) {', '.join(splits)}, not {split!r}")
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
    workers: Workers = None,
) -> None:
    """Decode every sample, check labels and names. Exit code 1 if anything is wrong."""
    wrong = verify(files, classes=classes, workers=workers or available_cores())
    for line in wrong[:20]:
        print(line)
    if wrong:
        print(f"{len(wrong)} thing(s) wrong")
        raise typer.Exit(1)
    print(f"all {describe(files)['images']} samples can be read")


@app.command("join")
def join_command(out: Out, files: Files, shards: Shards = 1) -> None:
    """Write several .beton files' samples to OUT as they are stored. Training needs no joined file: it takes a list."""
    for file in join(out, files, shards=shards):
        print(f"wrote {file}")


def main() -> None:
    """Exit code 0; 1 if `verify` found something; 2 after one line that says what is wrong; 130 when interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
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
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
