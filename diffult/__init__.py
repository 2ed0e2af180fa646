import os

# After each parallel loop GNU OpenMP's threads spin for milliseconds, on cores where a loader's threads decode. These
# turns are a fraction of one, and still enough from loop to loop. Read when torch is imported, which comes after.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
