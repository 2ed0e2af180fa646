"""The stand-in for ImageNet-LT, and the comparison of a killed run with an undisturbed one."""

import io
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import kills, standin, tables
from diffult.errors import UserError
from ffcv_writers.readers import open_source


@pytest.fixture
def photographs(tmp_path) -> Path:
    file = tmp_path / "photographs.tar"
    generator = np.random.default_rng(0)
    with tarfile.open(file, "w") as archive:
        for name, size in (("b", (40, 60)), ("a", (50, 30))):
            content = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(content, "JPEG")
            member = tarfile.TarInfo(f"{name}.JPEG")
            member.size = content.tell()
            archive.addfile(member, io.BytesIO(content.getvalue()))
    return file


def test_the_profile_has_the_published_ends_sum_and_groups():
    counts = standin.class_counts()
    assert counts.sum() == 115_846 and counts.max() == 1280 and counts.min() == 5 and len(counts) == 1000
    assert (np.diff(counts) <= 0).all()
    assert (counts >= 100).sum() == 390 and (counts > 20).sum() == 835  # MiSLAS: 0-390, 390-835, 835-1000


def test_images_differ_and_only_missing_ones_are_made(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(standin, "class_counts", lambda: np.array([9, 5, 2]))
    monkeypatch.setattr(standin, "CLASSES", 3)
    monkeypatch.setattr(standin, "_photographs", [])
    out = tmp_path / "set"
    standin.command(source=photographs, out=out, side=16, share=1.0, workers=1)
    lists = {f"{split}_list": out / f"ImageNet_LT_{split}.txt" for split in ("train", "val", "test")}
    source = open_source("list", out, **lists)
    assert np.bincount(source.splits["train"].labels).tolist() == [9, 5, 2]
    assert np.bincount(source.splits["val"].labels).tolist() == [1] * 3
    files = {file: file.read_bytes() for file in sorted(out.glob("*/*/*.jpg"))}
    assert len(files) == len(set(files.values())) == 16 + 3 * (1 + 2)
    assert {min(Image.open(file).size) for file in files} == {16}
    lost, kept = list(files)[3], list(files)[4]
    lost.unlink()
    kept.write_bytes(b"as it was")
    standin._photographs.clear()
    standin.command(source=photographs, out=out, side=16, share=1.0, workers=1)
    assert lost.read_bytes() == files[lost] and kept.read_bytes() == b"as it was"


def test_kills_hit_one_process_or_all_until_the_command_succeeds(tmp_path, monkeypatch):
    """A launcher with two children, which works for a second at its third start."""
    program = tmp_path / "launcher.py"
    program.write_text(
        "import pathlib, subprocess, sys, time\n"
        "starts = pathlib.Path(sys.argv[1])\n"
        "starts.write_text(starts.read_text() + 'x' if starts.exists() else 'x')\n"
        "children = [subprocess.Popen(['sleep', '60']) for _ in range(2)]\n"
        "time.sleep(1 if len(starts.read_text()) == 3 else 60)\n"
        "[child.kill() for child in children]\n"
    )
    starts, killed = tmp_path / "starts", []
    monkeypatch.setattr(kills, "_victims", lambda pid, at: ("host", kills._processes(pid)))
    kill = kills.os.kill
    monkeypatch.setattr(kills.os, "kill", lambda pid, number: (killed.append((pid, number)), kill(pid, number)))
    (tmp_path / "run").mkdir()
    result = kills.killed([sys.executable, str(program), str(starts)], tmp_path / "run", 2, 4.0, 0)
    assert starts.read_text() == "xxx" and [event["killed"] for event in result["kills"]] == ["host"] * 2
    assert result["seconds"] >= result["kills"][1]["after_s"] and not (tmp_path / "run").exists()
    assert len(killed) == 6 and {number for _, number in killed} == {signal.SIGKILL}


def test_victims_are_a_process_of_the_launcher_or_everything():
    launcher = subprocess.Popen(["bash", "-c", "sleep 60 & sleep 60 & wait"])
    try:
        end = time.monotonic() + 60
        while len(kills._processes(launcher.pid)) < 3:
            assert launcher.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        first, second = sorted(kills._processes(launcher.pid)[1:])
        seen = dict(kills._victims(launcher.pid, random.Random(i)) for i in range(20))
        assert seen == {"host": [launcher.pid, first, second], "process 0": [first], "process 1": [second]}
    finally:
        for process in reversed(kills._processes(launcher.pid)):
            kills.os.kill(process, signal.SIGKILL)
        launcher.wait()


@pytest.mark.parametrize(("program", "reason"), [("raise SystemExit(3)", "exit code 3"), ("", "after 0 of 1 kills")])
def test_a_failure_that_was_no_kill_and_an_end_before_the_last_kill_are_reported(tmp_path, program, reason):
    with pytest.raises(UserError, match=reason):
        kills.killed([sys.executable, "-c", program], tmp_path / "run", 1, 1000.0, 0)


def test_tables():
    content = {
        "rows": {"pack": {"images": 1000, "seconds": 4.0, "peak_mb": 300}},
        "run": {"images": 2290, "drawn": 2100, "accepted": 2000},
        "calm": {"seconds": 60.0},
        "killed": {"seconds": 90.0, "kills": [{"killed": "host", "after_s": 7.0}, {"killed": "host", "after_s": 9.5}]},
        "same": {"metrics.json": True, "diffusion/ema": False},
    }
    assert "| packing | 1,000 | 4 | 250 | 300 |" in tables.many_images_table(content)
    text = tables.kills_table(content)
    assert "| seconds, killed 2 times | 90 |" in text and "| killed | host: 2 times |" in text
    assert "| the same in both runs | metrics.json (1 of 2) |" in text
