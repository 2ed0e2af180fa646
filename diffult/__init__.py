import os
import signal
import sys
from types import FrameType

# After each parallel loop GNU OpenMP's threads spin for milliseconds, on cores where a loader's threads decode. These
# turns are a fraction of one, and still enough from loop to loop. Read when torch is imported, which comes after.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

INTERRUPTED = "interrupted; the same command resumes from here"


def _interrupt(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)


# `python -m diffult.VERB` spends seconds in importing torch, where Ctrl-C would print the middle of it. `cli.main`
# takes over.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupt)
