"""The command line that all verbs share: common options, logging, one-line errors, exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from diffult.engine.device import keep_freed_memory
from diffult.errors import UserError

UsageError: Any = typer.BadParameter.__base__  # its module differs between versions of typer
RunOption = Annotated[Path, typer.Option("--run", help="Run directory.", show_default=False)]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Preset to start a new run from: a name, or a file.toml such as a config.toml.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Override a setting, also on an existing run: section.key=value. Repeatable.", show_default=False
    ),
]


def main(verb: Callable[..., None]) -> None:
    """Runs a verb as a command: exit code 0, or 2 after one line that says what is wrong, or 130 when interrupted."""
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(verb)
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # what typer made of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(code)
    except UserError as error:
        message = str(error)
    except UsageError as error:
        message = f"{error.format_message()} (--help lists the options)"
    except OSError as error:  # a folder that is a file, a full disk, no permission
        message = f"{error.filename or 'file system'}: {error.strerror or error}; choose another place or make room"
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; the same command resumes from here", file=sys.stderr)
        sys.exit(130)
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)
