"""The command line that all verbs share: common options, logging, one-line errors, exit codes."""

from __future__ import annotations

import errno
import logging
import os
import platform
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from diffult import INTERRUPTED
from diffult.engine.device import keep_freed_memory
from diffult.engine.distributed import lost_process
from diffult.engine.memory import out_of_memory
from diffult.errors import UserError, first_line

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

_NO_PERMISSION = "change its permissions, or choose another place (--out, --run)"
_MAKE_ROOM = "make room, or choose another place"
_DISK_FAILED = "its disk failed: see that it works, then the same command again goes on"
_ADVICE = {
    errno.EISDIR: "a file is needed there: move the folder away",
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EROFS: "choose another place (--out, --run)",
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: _MAKE_ROOM,
    errno.EIO: _DISK_FAILED,
    errno.ESTALE: _DISK_FAILED,
    errno.ETIMEDOUT: _DISK_FAILED,
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system has no more open files to give",
    errno.ENOMEM: "close other programs, or lower the batch size",
}
_PACKAGES = ("torch", "triton", "numpy", "xformers", "ffcv", "safetensors", "pydantic")  # of a bug report


def main(verb: Callable[..., None]) -> None:
    """Runs a verb as a command. Exit code 0; 2 after one line that says what is wrong; 130 when interrupted; 1 after a
    report of an error that is ours."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _run(verb)
    except UserError as error:
        _refuse(str(error))
    except UsageError as error:
        _refuse(f"{error.format_message()} (--help lists the options)")
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:  # a folder that is a file, a full disk, no permission
        advice = _ADVICE.get(error.errno or 0, "choose another place or make room")
        _refuse(f"{error.filename or 'file system'}: {error.strerror or error}; {advice}")
    except (KeyboardInterrupt, typer.Abort):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends what is left to do
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if out_of_memory(error):
            _refuse(f"out of memory ({first_line(error)}); lower the batch size, or close other programs")
        if lost_process(error):
            _refuse("another process of this training has ended; look for its message")
        print(bug_report(error), file=sys.stderr)
        sys.exit(1)


def _run(verb: Callable[..., None]) -> None:
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # a class may be named in any script, and by bytes that are no text
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(verb)
    code = app(standalone_mode=False) or 0
    if code == 130:  # what typer made of a KeyboardInterrupt
        raise KeyboardInterrupt
    sys.stdout.flush()
    sys.exit(code)


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


def bug_report(error: Exception) -> str:
    """An error that no user can have caused: its traceback, what was run, and where to send this."""
    versions = [f"{name} {found}" for name in ("diffult", *_PACKAGES) if (found := _version(name))]
    rows = {
        "command": shlex.join(sys.orig_argv),
        "folder": Path.cwd(),
        "run": _run_directory(sys.argv) or "not named",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "machine": platform.platform(),
    }
    lines = "".join(f"  {name}: {value}\n" for name, value in rows.items())
    trace = "".join(traceback.format_exception(error))
    return (
        f"{trace}\nThis is a bug in diffult. Please send all of this, from the traceback on, to {tracker()}:\n{lines}"
    )


def tracker() -> str:
    """The address that the package gives for issues."""
    try:
        urls = metadata.metadata("diffult").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        urls = []
    named = dict(url.split(", ", 1) for url in urls)
    return next((url for name, url in named.items() if "issue" in name.lower()), "the project's issue tracker")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run_directory(arguments: list[str]) -> str | None:
    """What --run names."""
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option == "--run" or option.startswith("--run="):
            return str(Path(option.partition("=")[2] or value).absolute())
    return None
