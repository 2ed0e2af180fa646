"""A folder seen by processes on several hosts: all must see the same files before they act on them.

A network disk may show a host what it held a minute ago, and a disk of each host's own never shows what another host
wrote.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from diffult.engine.distributed import World
from diffult.errors import UserError
from diffult.runs.files import lock_folder

PATIENCE = 90  # seconds; NFS asks its server again after 60 (acdirmax)

_Files = dict[str, tuple[int, int]]  # size and time of the last change in ns, by the path from the first folder


def lock_shared(folder: Path, world: World) -> AbstractContextManager[None]:
    """As `lock_folder`, for the first of several processes. It waits for a lock that a host which died may have
    left."""
    return lock_folder(folder, PATIENCE if world.size > 1 else 0)


def wait_for_same_files(folders: Iterable[Path], world: World) -> None:
    """Returns once every process sees the same files in these folders, by name, size and time, without those below and
    hidden ones. Every process of `world` calls this, while none writes there.

    Raises:
        UserError: they still differ after PATIENCE.
    """
    if world.size == 1:
        return
    folders = list(folders)
    world.gather(None)  # the last one to come may have written until now
    for left in reversed(range(PATIENCE + 1)):
        seen = _files(folders)
        digests = world.gather(hashlib.sha256(repr(sorted(seen.items())).encode()).hexdigest())
        if len(set(digests)) == 1:
            return
        if left:
            time.sleep(1)
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    views = world.gather((socket.gethostname(), seen if world.rank in (0, other) else _Files()))
    (first, theirs), (host, mine) = views[0], views[other]
    name = next(name for name in sorted(theirs | mine) if theirs.get(name) != mine.get(name))
    raise UserError(
        f"{folders[0]}: hosts {first} and {host} (processes 0 and {other}) do not see the same {name}, {PATIENCE} s "
        "after it was written; put this folder on a disk that all hosts share (docs/cluster.md)"
    )


def _files(folders: list[Path]) -> _Files:
    found = {}
    for folder in folders:
        place = os.path.relpath(folder, folders[0])
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name[0] != "." and entry.is_file():
                        about = os.stat(entry.path)
                        found[os.path.normpath(f"{place}/{entry.name}")] = (about.st_size, about.st_mtime_ns)
        except FileNotFoundError:  # no folder yet, or the file was just replaced: the next look differs from others'
            continue
    return found
