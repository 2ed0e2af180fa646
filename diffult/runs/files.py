"""Files that are whole or not there: everything is written under a temporary name and renamed."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffult.engine.memory import out_of_memory
from diffult.errors import DamagedError, UserError, first_line

log = logging.getLogger(__name__)
_UMASK = os.umask(0)  # which can be read only by setting it, for all threads: so once, here
os.umask(_UMASK)
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_DEPTH = 3  # of the folders of exported images
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # NFS or Lustre, mounted without
_CHECKSUM = "crc32"  # in the metadata of safetensors


@contextmanager
def atomic_write(path: Path, backup: Path | None = None) -> Iterator[Path]:
    """A temporary path beside `path`, on disk and renamed to it when the block ends well, removed when it does not.
    What `path` was before becomes `backup`."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # root could put a file in the place of /dev/null
        raise UserError(f"{path}: is a device or a pipe; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fchmod(written.fileno(), 0o666 & ~_UMASK)  # safetensors writes 0600
            os.fsync(written.fileno())
        if backup is not None and path.exists():
            os.replace(path, backup)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, temporary, str(temporary)):  # no name, or one that the user has never seen
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def temporary_path(path: Path) -> Path:
    """The name, beside `path`, that it has until it is whole; what a killed process left is removed when the folder, or
    one above it, is locked."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def lock_folder(folder: Path, patience: float = 0) -> Iterator[None]:
    """Locks a folder, created where it is missing, for this process, and removes what killed ones left half written
    there; the system releases it however the process ends. A disk without locks is used without, which is logged.

    Args:
        patience: seconds to wait for another process: of a host that died, a network disk keeps the lock for a while.

    Raises:
        UserError: another process writes to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _open_lock(folder / ".lock") as lock:
        for left in reversed(range(math.ceil(patience) + 1)):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise UserError(f"{folder}: another process writes to it; wait for it, or stop it") from None
                time.sleep(1)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                log.warning("%s: its disk has no locks (%s); start one command at a time", folder, error.strerror)
                break
        _remove_temporaries(folder, _DEPTH)
        yield


def _open_lock(file: Path) -> IO[Any]:
    try:
        return file.open("ab")
    except PermissionError:
        if not file.exists():
            raise
        return file.open("rb")  # of someone else who shares the folder


def _remove_temporaries(folder: Path, depth: int) -> None:
    """In the folder and those below, except where another lock may be held."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # someone else's
                below = entry.is_dir(follow_symlinks=False)
                if _TEMPORARY.fullmatch(entry.name):
                    shutil.rmtree(entry.path) if below else os.unlink(entry.path)
                elif below and depth and not os.path.exists(os.path.join(entry.path, ".lock")):
                    _remove_temporaries(Path(entry.path), depth - 1)


def write_text(path: Path, text: str) -> None:
    """As UTF-8. What that cannot hold, a byte of a file's name that is no text, is written as an escape."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of thousands of digits
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged; delete it to run its stage again")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The readings of a training, a JSON object a line; a part of a line, which a killed training may leave, is left
    out. Raises UserError where a line is anything else."""
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            reading = json.loads(line)
            if not all(isinstance(value, int | float) for value in reading.values()):
                raise TypeError("not a number")
            lines.append({**reading, "step": int(reading["step"]), "images_per_s": float(reading["images_per_s"])})
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise UserError(f"{path}: line {number} is damaged; remove the line, or the file") from None
    return lines


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes safetensors with text metadata and a checksum of both. Raises UserError where the disk is full or the
    system refuses."""
    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(whole, temporary, {**metadata, _CHECKSUM: _checksum(whole, metadata)})
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be written ({error}); choose another place or make room") from None


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises UserError if it is missing, DamagedError if it is no such
    file, truncated, or not as it was written, OSError if it cannot be read."""
    try:
        _check_readable(path)
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            about = dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run the stage that writes it first") from None
    except OSError as error:
        _name(error, path)
        raise
    except SafetensorError as error:
        raise DamagedError(f"{path}: damaged ({error}); delete it to run its stage again") from None
    written = about.pop(_CHECKSUM, None)
    if written is not None and written != _checksum(tensors, about):
        raise DamagedError(f"{path}: damaged (not as it was written); delete it to run its stage again")
    return tensors, about


def _check_readable(path: Path) -> None:
    """Raises the system's own error: safetensors reports any of them as a file that is not there."""
    path.open("rb").close()


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    value = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        flat = tensor.as_strided((tensor.numel(),), (1,))  # of one value the stride may be anything
        value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors; empty if it is missing or damaged. Raises OSError if it
    cannot be read."""
    try:
        _check_readable(path)
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, FileNotFoundError):
        return {}


@contextmanager
def as_weights(path: Path) -> Iterator[None]:
    """Where a network is made of a safetensors file: raises DamagedError if it holds no such network."""
    try:
        yield
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        if is_of_the_machine(error):
            raise
        raise DamagedError(
            f"{path}: not the weights of this network ({first_line(error, 120)}); delete it to train again"
        ) from None


def save_state(path: Path, state: Mapping[str, Any], backup: Path | None = None) -> None:
    """Writes training state: tensors, numbers and containers of them; what `path` was before becomes `backup`. Raises
    UserError as `save_tensors` does."""
    with atomic_write(path, backup) as temporary:
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
    """What `save_state` wrote, data alone (weights_only). Raises DamagedError if the file is truncated, holds code,
    or is not as it was written, OSError if it cannot be read, MemoryError or RuntimeError if memory is short."""
    try:
        with path.open("rb") as file, ZipFile(file) as archive:
            if archive.testzip() is not None:  # first: torch reads no checksum and allocates what a damaged file says
                raise ValueError("not as it was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("not the state of a training")
        return state
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        if is_of_the_machine(error):
            _name(error, path)
            raise
        raise damaged_checkpoint(path, error) from None


def damaged_checkpoint(path: Path, error: Exception) -> DamagedError:
    return DamagedError(f"{path}: damaged checkpoint ({first_line(error, 120)}); delete it to restart this stage")


def is_of_the_machine(error: Exception) -> bool:
    """Whether memory, a disk or a card failed where a file was read: the file may be whole."""
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EINVAL)  # which a damaged table leads to: a place before the beginning
    return isinstance(error, torch.AcceleratorError) or out_of_memory(error)


def _name(error: Exception, path: Path) -> None:
    """Where the system's error names no file, as that of a read."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)
