#!/usr/bin/env bash
# What a CUDA card is needed for, from a checkout, in three parts that each end by themselves within nine minutes:
#
#     bench/gpu.sh check     what a card may refuse, every kernel against float64, training and sampling races
#     bench/gpu.sh cifar     CIFAR10-LT, from raw images to final classifiers
#     bench/gpu.sh tune      kernels/tiles.json for this card
#     bench/gpu.sh           all three, in this order
#
# A part is a list of items, each with its own process, log and time. One that fails or is cut off does not keep the
# next from running. OUT/PART.tar.gz holds the results so far: it is made anew after each item and every 20 seconds, so
# that a kill loses nothing that was there. Exit code 1 where an item failed, was cut off or was not reached.
#
#     WHEELS=DIR   of `make wheels`, for a machine without internet; wheels/ where that is there
#     DATA=PATH    CIFAR-10's archive or folder, for the part cifar
#     OUT=DIR      for the archives, each under 16 MiB; default bench/results/gpu
#     WORK=DIR     for logs, results and installed packages; default build/gpu
#     LIMIT=SEC    of a part; default 520
#     SMOKE=1      every item at a size for two CPU cores, and thrice the time for it
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu} PY=${PY:-python3} SMOKE=${SMOKE:-} DATA=${DATA:-}
[ -n "${WHEELS:-}" ] || { [ -d wheels ] && WHEELS=wheels; } || WHEELS=
mkdir -p "$OUT" "${WORK:=build/gpu}"
WORK=$(cd "$WORK" && pwd)
SITE=$WORK/site # packages go beside the machine's own, not among them
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

SLOW=${SMOKE:+3} SLOW=${SLOW:-1}
LIMIT=$((${LIMIT:-520} * SLOW)) # seconds of a part
GRACE=15            # of them to stop an item and write the archive
declare -A ITEMS=( # name:seconds it may take, the most valuable first
    [check]="setup:40 doctor:20 backward_in_graph:25 checkpointing_in_graph:25 attention_in_compile:35 graph_beside_nccl:25
        kernels:90 training_step:150 gpu_tests:45 kernel_tests:45"
    [cifar]="setup:40 cifar:460"
    [tune]="setup:40 tune:460"
)

setup() { # torch, triton, numpy and whatever else is there stay as they are
    local from=(--no-deps --no-compile --target "$SITE" --retries 0 --timeout 5) missing without=() name
    [ -z "$WHEELS" ] || from+=(--no-index --find-links "$WHEELS")
    mapfile -t missing < <("$PY" -c '
from importlib.metadata import distributions
from re import sub
there = {sub("[-_.]+", "-", d.name).lower() for d in distributions()}
for line in open("bench/wheels.txt").read().splitlines():
    if line[:1] not in ("", "#") and sub("[-_.]+", "-", line.split("==")[0]).lower() not in there:
        print(line)')
    [ ${#missing[@]} = 0 ] || "$PY" -m pip install -q "${from[@]}" "${missing[@]}" && return
    for name in "${missing[@]}"; do # each on its own: one that fails drops one
        "$PY" -m pip install -q "${from[@]}" "$name" || without+=("$name")
    done
    echo "without ${without[*]:-anything missing}"
}
doctor() { "$PY" -m diffult.doctor; }
backward_in_graph() { "$PY" -m bench.first_minute backward_in_graph; }
checkpointing_in_graph() { "$PY" -m bench.first_minute checkpointing_in_graph; }
attention_in_compile() { "$PY" -m bench.first_minute attention_in_compile; }
graph_beside_nccl() { "$PY" -m bench.first_minute graph_beside_nccl; }
kernels() { "$PY" -m bench.kernels --check --budget "$BUDGET" --out "$RESULTS" ${SMOKE:+--smoke}; }
training_step() {
    "$PY" -m bench.training_step --preset cifar10-lt-100 --budget "$BUDGET" --out "$RESULTS" ${SMOKE:+--smoke}
}
tests() { "$PY" -m pytest -o addopts=-q --continue-on-collection-errors "$@"; }
gpu_tests() { tests -m gpu $(grep -rl 'pytest\.mark\.gpu' tests); }
kernel_tests() { tests -m 'not gpu and not slow' "tests/kernels${SMOKE:+/test_kernels_diffuse.py}"; }
cifar() {
    [ -n "$DATA$SMOKE" ] || { echo "error: DATA=PATH of CIFAR-10 is needed"; return 2; }
    "$PY" -m bench.cifar --run "$WORK/run${SMOKE:+-smoke}" --out "$RESULTS" --budget "$BUDGET" ${DATA:+--data "$DATA"} \
        ${SMOKE:+--smoke}
}
tune() { "$PY" -m bench.kernels --tune --budget "$BUDGET" --out "$RESULTS" ${SMOKE:+--smoke}; }

pack() { # under another name until it is whole; a file of 7 MiB or more would leave no room for others
    (cd "$WORK" && find "$part" -type f -size -8M -print0 | tar --null -T - -czf - 2>/dev/null) >"$OUT/.$part.partial"
    mv "$OUT/.$part.partial" "$OUT/$part.tar.gz"
}
note() { printf '%-24s %4s s  %s\n' "$@" | tee -a "$RESULTS/summary.txt"; }

run_item() { # NAME SECONDS
    local left=$((LIMIT - GRACE - SECONDS)) since=$SECONDS code=0 ticks=0 lines=3 state=ok limit
    item=$1 limit=$(($2 * SLOW))
    ((limit = limit < left ? limit : left))
    [ "$limit" -ge 10 ] || { unreached+=("$item"); return; }
    BUDGET=$((limit > 40 ? limit - 15 : limit)) # a program that knows its budget ends by itself
    echo "== $item, at most $limit s (log: $RESULTS/$item.log)"
    timeout --signal=INT --kill-after=10 "$limit" bash -uo pipefail -c "$item" >"$RESULTS/$item.log" 2>&1 &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.2 & wait $! # and not sleep alone: a signal is answered at once
        ((++ticks % 100)) || pack
    done
    wait "$child" || code=$?
    child=
    case $code in
        0) ;;
        3) state="budget spent before the end" ;;
        124 | 137) state="cut off at $limit s" ;;
        *) state="failed, exit code $code" ;;
    esac
    [ $code = 0 ] || failed+=("$item")
    case $item in kernels | training_step | cifar | tune) lines=14 ;; esac
    tr '\r' '\n' <"$RESULTS/$item.log" | grep -v '^ *$' | tail -n "$lines" | cut -c1-140 | sed 's/^/    /'
    note "$item" $((SECONDS - since)) "$state"
    pack
}

finish() { # prints what there is, last
    echo "== $part, $SECONDS s"
    cat "$RESULTS/summary.txt"
    { [ ${#failed[@]} = 0 ] || echo "error: failed or cut off: ${failed[*]}"
      [ ${#unreached[@]} = 0 ] || echo "error: not reached in $LIMIT s: ${unreached[*]}"
      find "$RESULTS" -type f -size +7M -printf 'left out, too large: %p\n'; } | tee -a "$RESULTS/summary.txt"
    pack
    echo "results: $OUT/$part.tar.gz, $(du -k "$OUT/$part.tar.gz" | cut -f1) KiB, $(tar -tzf "$OUT/$part.tar.gz" | wc -l) files"
}

stopped() { # by a signal: the running item ends, what there is stays
    trap '' INT TERM HUP
    pack
    [ -z "$child" ] || { kill -TERM "$child"; wait "$child"; failed+=("$item"); note "$item" - "stopped by a signal"; }
    finish
    exit 130
}

run_part() {
    local entry
    RESULTS=$WORK/$part SECONDS=0 failed=() unreached=() child= item=
    export RESULTS BUDGET
    rm -rf "$RESULTS"
    mkdir -p "$RESULTS"
    trap stopped INT TERM HUP
    for entry in ${ITEMS[$part]}; do
        run_item "${entry%:*}" "${entry#*:}"
    done
    finish
    [ $((${#failed[@]} + ${#unreached[@]})) = 0 ]
}

export PY SMOKE DATA WHEELS SITE
export -f setup doctor backward_in_graph checkpointing_in_graph attention_in_compile graph_beside_nccl kernels \
    training_step tests gpu_tests kernel_tests cifar tune
[ $# -gt 0 ] || set -- check cifar tune
for part; do
    [ -n "${ITEMS[$part]:-}" ] || { echo "error: no part '$part'; there are: check cifar tune"; exit 2; }
done
code=0
for part; do
    run_part || code=1
done
exit $code
