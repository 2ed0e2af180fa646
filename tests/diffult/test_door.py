"""The door that every command goes through: one line for what a user can cause, a report for what is ours."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
import typer

from diffult import cli
from diffult.engine import distributed
from diffult.engine.distributed import ALONE, init_distributed
from diffult.errors import UserError


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch):
    """The door sets up the logs and the signals of a process of its own."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[int, str]:
    """Exit code and what a command prints that ends in this error."""

    def verb() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["verb"])
    with pytest.raises(SystemExit) as caught:
        cli.main(verb)
    return int(caught.value.code or 0), capsys.readouterr().err


def refusal(number: int, name: str | None = "runs/x") -> OSError:
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("no such\nclass"), "error: no such class"),
        (refusal(errno.EACCES), "error: runs/x: Permission denied; change its permissions, or choose another place"),
        (refusal(errno.EROFS), "error: runs/x: Read-only file system; choose another place (--out, --run)"),
        (refusal(errno.ENOSPC), "error: runs/x: No space left on device; make room"),
        (refusal(errno.EFBIG, None), "error: file system: File too large; make room"),
        (refusal(errno.EIO), "error: runs/x: Input/output error; its disk failed: see that it works, then the same"),
        (refusal(errno.EMFILE), "error: runs/x: Too many open files; raise the limit on open files (ulimit -n)"),
        (refusal(errno.ENAMETOOLONG), "error: runs/x: File name too long; choose another place"),
        (typer.BadParameter("not a number"), "error: Invalid value: not a number (--help lists the options)"),
        (MemoryError(), "error: out of memory (MemoryError); lower the batch size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmuch"), "error: out of memory (CUDA out of memory. Tried)"),
        (torch.distributed.DistNetworkError("timed out"), "error: another process of this training has ended"),
    ],
)
def test_what_a_user_can_cause_is_one_line(monkeypatch, capsys, error: BaseException, message: str) -> None:
    code, printed = run(monkeypatch, capsys, error)
    assert code == 2 and printed.startswith(message) and printed.count("\n") == 1


def test_a_host_without_memory_is_told_in_a_line(monkeypatch, capsys) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert run(monkeypatch, capsys, caught.value)[1].startswith("error: out of memory (")


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys) -> None:
    assert run(monkeypatch, capsys, KeyboardInterrupt()) == (130, "interrupted; the same command resumes from here\n")


@pytest.mark.parametrize("urls", [None, ["Issues, https://example.org/issues", "Homepage, https://example.org"]])
def test_anything_else_is_a_bug_report(monkeypatch, capsys, urls) -> None:
    class About(dict):
        def get_all(self, key: str) -> list[str] | None:
            return urls

    monkeypatch.setattr(metadata, "metadata", lambda package: About())
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "diffult.run", "--run", "a b"])
    monkeypatch.setattr(cli, "_run_directory", lambda arguments: cli_directory(["--run", "a b"]))
    code, printed = run(monkeypatch, capsys, ZeroDivisionError("ours"))
    assert code == 1
    assert printed.startswith("Traceback (most recent call last)") and "ZeroDivisionError: ours" in printed
    where = "https://example.org/issues" if urls else "the project's issue tracker"
    assert f"This is a bug in diffult. Please send all of this, from the traceback on, to {where}:" in printed
    assert "command: python -m diffult.run --run 'a b'" in printed
    assert f"run: {Path.cwd() / 'a b'}" in printed
    assert f"torch {metadata.version('torch')}" in printed and f"Python {sys.version.split()[0]}" in printed


cli_directory = cli._run_directory


def test_the_run_directory_of_a_report_is_that_of_the_command() -> None:
    for arguments in (["generate", "--run", "r"], ["generate", "--run=r", "--fast"]):
        assert cli_directory(arguments) == str(Path.cwd() / "r")
    assert cli_directory(["generate", "--fast"]) is None


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, capsys) -> None:
    closed: list[int] = []
    monkeypatch.setattr(os, "dup2", lambda _, number: closed.append(number))
    assert run(monkeypatch, capsys, BrokenPipeError()) == (1, "") and closed == [1]


def test_ctrl_c_while_torch_is_imported_is_one_line() -> None:
    command = [sys.executable, "-m", "diffult.generate", "--help"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{child.pid}/maps")
    while "libtorch" not in maps.read_text():  # seconds before the first line of the verb
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate()
    assert (child.returncode, out, err) == (130, "", "interrupted; the same command resumes from here\n")


# torchrun's variables

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": None}, "WORLD_SIZE is set, but RANK not"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE is set, but MASTER_PORT not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not as torchrun sets it"),
        ({"WORLD_SIZE": "0"}, "RANK=0 is not as torchrun sets it"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=999"),
        ({"RANK": "2"}, "RANK=2 is not as torchrun sets it"),
        ({"RANK": "-1"}, "RANK=-1 is not as torchrun sets it"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x is not as torchrun sets it"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not as torchrun sets it"),
    ],
)
def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch, changed, message: str) -> None:
    for name, value in (TORCHRUN | changed).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        init_distributed()
    assert str(caught.value).startswith(message) and "torchrun" in str(caught.value)


def test_processes_that_cannot_be_reached_are_one_line(monkeypatch) -> None:
    def refused(*_, **__):
        raise torch.distributed.DistNetworkError("The client socket has failed\nto connect")

    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.dist, "rendezvous", refused)
    with pytest.raises(UserError, match=r"cannot join the other processes \(The client socket has failed\); start all"):
        init_distributed()


@pytest.mark.parametrize("size", ["1", ""])
def test_one_process_needs_nothing_of_torchrun(monkeypatch, size: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    assert init_distributed() == ALONE
