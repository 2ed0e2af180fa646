"""Several processes, dying processes, no shared memory: each ends, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ffcv_writers
from ffcv_writers import open_set, write

pytestmark = pytest.mark.timeout(250)
ROOT = Path(ffcv_writers.__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(program: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, **options)  # type: ignore[call-overload]


def small_set(path: Path, count: int, synthetic: int = 0) -> np.ndarray:
    images = np.random.default_rng(synthetic).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    names = np.arange(count)
    write(path, images, labels=names % 10, synthetic=0 * names + synthetic, index=names, storage="jpg")
    return images


def test_three_processes_share_an_epoch_without_duplicates(tmp_path: Path) -> None:
    """Each sample once, in batches of equal ratio; a process that is started anew in the middle goes on as before."""
    program = """if True:
        import json, sys
        from ffcv_writers import Loader, Ratio, open_set
        rank, first, real, generated = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
        image_set = open_set([real, generated])
        loader = Loader(image_set, 16, resident=False, num_workers=1)
        out = []
        for draws in Ratio(image_set.synthetic, 12, 4).steps(7, 16, first, 10, rank=rank, world=3):
            for batch in loader.batches(*draws):
                sums = batch.images.flatten(1).sum(1, dtype=int)
                out.append([batch.sample.tolist(), batch.position.tolist(), sums.tolist()])
        print(json.dumps(out))
    """
    paths = [tmp_path / "real.beton", tmp_path / "generated.beton"]
    small_set(paths[0], 360), small_set(paths[1], 120, 1)
    image_set = open_set(paths)
    children = [start(program, rank, first, *paths) for rank, first in ((0, 0), (1, 0), (2, 0), (1, 6))]
    outputs = [json.loads(child.communicate(timeout=200)[0]) for child in children]
    assert [child.returncode for child in children] == [0] * 4
    resumed = outputs.pop()
    assert resumed == outputs[1][6:]
    samples, positions, sums = np.array(outputs).transpose(2, 1, 0, 3).reshape(3, 10, 48)  # step by step, all ranks
    np.testing.assert_array_equal(positions.ravel(), np.arange(480))
    np.testing.assert_array_equal(np.sort(samples.ravel()), np.arange(480))  # an epoch: 360 real and 120 generated
    assert (image_set.synthetic[samples].reshape(30, 16).sum(1) == 4).all()
    pixels = image_set.take(samples.ravel()).reshape(480, -1).sum(1, dtype=int)
    np.testing.assert_array_equal(sums.ravel(), pixels)


def children_of(pid: int) -> list[str]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for path in lists for child in path.read_text().split()]


@pytest.mark.parametrize("what", ["write", "load"])
def test_there_is_no_worker_that_could_die_alone(tmp_path: Path, what: str) -> None:
    """Threads work: a killed writer or trainer leaves no child behind, no shared memory and no half a file."""
    program = """if True:
        import sys, time
        import numpy as np
        from ffcv_writers import Loader, open_set, write
        what, path, out = sys.argv[1:]
        def pause():
            print("in the middle", flush=True)
            time.sleep(60)
        class Slow:
            def __len__(self):
                return 1000
            def __getitem__(self, number):
                if number == 500:
                    pause()
                return np.zeros((8, 8, 3), np.uint8)
        names = np.arange(1000)
        if what == "write":
            write(out, Slow(), labels=names, synthetic=0 * names, index=names, workers=4, storage="jpg")
        for number, _ in enumerate(Loader(open_set([path]), 16, num_workers=4, resident=False).sequential()):
            if number == 5:
                pause()
    """
    small_set(tmp_path / "set.beton", 600)
    before = set(os.listdir("/dev/shm"))
    child = start(program, what, tmp_path / "set.beton", tmp_path / "out" / "new.beton", start_new_session=True)
    assert child.stdout is not None and child.stdout.readline() == "in the middle\n"
    assert len(os.listdir(f"/proc/{child.pid}/task")) > 4 and children_of(child.pid) == []
    child.send_signal(signal.SIGKILL)
    child.wait()
    with pytest.raises(ProcessLookupError):  # nobody is left of its group
        os.killpg(child.pid, 0)
    assert set(os.listdir("/dev/shm")) <= before
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.beton"))


def test_a_full_dev_shm_is_no_matter(tmp_path: Path) -> None:
    """In a mount namespace whose /dev/shm takes 16 KiB and is full."""
    program = """if True:
        import errno, os, sys
        import numpy as np
        from ffcv_writers import Loader, open_set, write
        try:
            with open("/dev/shm/full", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
        images, names = np.arange(200 * 192, dtype=np.uint8).reshape(200, 8, 8, 3), np.arange(200)
        write(sys.argv[1], images, labels=names, synthetic=0 * names, index=names, workers=2)
        batches = list(Loader(open_set([sys.argv[1]]), 16, num_workers=2, resident=False).sequential())
        assert (np.concatenate([batch.images for batch in batches]) == images).all()
        print(sorted(os.listdir("/dev/shm")))
    """
    mount = 'mount -t tmpfs -o size=16k tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if os.geteuid() or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    python = [sys.executable, "-c", program, str(tmp_path / "set.beton")]
    done = subprocess.run([*command, *python], capture_output=True, text=True, timeout=200, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['full']\n"
