"""Files that are whole or not there: everything is written under a temporary name and renamed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffult.errors import DamagedError, UserError

_UMASK = os.umask(0)  # which can be read only by setting it, for all threads: so once, here
os.umask(_UMASK)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, on disk and renamed to it when the block ends well, removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fchmod(written.fileno(), 0o666 & ~_UMASK)  # safetensors writes 0600
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks a folder, created where it is missing, for this process; the system releases it however the process ends.

    Raises:
        UserError: another process writes to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process writes to it; wait for it, or stop it") from None
        yield


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged; delete it to run its stage again")
    return content


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes safetensors with text metadata. Raises UserError where the disk is full or the system refuses."""
    with atomic_write(path) as temporary:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, dict(metadata))
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be written ({error}); choose another place or make room") from None


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises UserError if it is missing, DamagedError if it is no such
    file or truncated."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run the stage that writes it first") from None
    except SafetensorError as error:
        raise DamagedError(f"{path}: damaged ({error}); delete it to run its stage again") from None


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors; empty if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes training state: tensors, numbers and containers of them. Raises UserError as `save_tensors` does."""
    with atomic_write(path) as temporary:
        try:
            torch.save(dict(state), temporary)
        except RuntimeError as error:
            if not any(part in str(error) for part in ("inline_container", "StreamWriter")):
                raise  # not about the file
            # torch reports a position in the file, not the system's reason.
            raise UserError(
                f"{path}: cannot be written (is the disk full?); choose another place or make room"
            ) from None


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, data alone (weights_only). Raises UserError if the file is truncated or holds code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged checkpoint ({reason[:120]}); delete it to restart this stage") from None
