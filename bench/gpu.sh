#!/usr/bin/env bash
# Everything that a GPU is needed for, from a checkout, in steps that each end within nine minutes:
#
#     bench/gpu.sh                       all steps that are not done yet
#     bench/gpu.sh tests suite           these
#
# A step that is cut off goes on where it was when called again; what is done leaves OUT/STEP.done. One that fails does
# not keep the others from running.
#     WHEELS=DIR   wheels for a machine without internet
#     DATA=PATH    CIFAR-10's folder or archive, for the step cifar
#     PRESET=NAME  of that step; cifar10-lt-100-fast, or cifar10-lt-100, which takes hours
#     OUT=DIR      results, well under 60 MiB        RUN=DIR  the CIFAR10-LT run (weights and checkpoints: a gigabyte)
#     SMOKE=1      every step at a size that a CPU does in minutes, on the bundled digits
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu} RUN=${RUN:-runs/gpu} PY=${PY:-python3} SMOKE=${SMOKE:-} LIMIT=540
PRESET=${PRESET:-cifar10-lt-100-fast}
STEPS=(setup tests tune kernels step suite cifar trace)
mkdir -p "$OUT"

setup() { # torch, triton and numpy are the machine's own; what is missing comes from the wheels or the index
    [ -n "$SMOKE" ] && return
    local from=()
    [ -n "${WHEELS:-}" ] && from=(--no-index --find-links "$WHEELS")
    "$PY" -m pip install -q "${from[@]}" pydantic safetensors scikit-learn tomli-w tqdm typer jinja2 matplotlib pillow \
        pytest pytest-timeout pytest-benchmark hypothesis scipy diffusers
    "$PY" -m pip install -q --no-deps "${from[@]}" torchvision xformers ffcv || echo "without torchvision, xformers or ffcv"
    "$PY" -m diffult.doctor
}
tests() { # those that need a card, and those of the kernels, which take one where it is there
    local code=0
    "$PY" -m pytest -m gpu tests || code=1
    [ -n "$SMOKE" ] || "$PY" -m pytest tests/kernels || code=1
    return $code
}
tune() {
    trap 'cp kernels/tiles.json "$OUT"' EXIT
    [ -n "$SMOKE" ] || "$PY" -m bench.kernels --tune
}
kernels() { [ -n "$SMOKE" ] || "$PY" -m bench.kernels --resume --out "$OUT"; }
step() {
    local preset=cifar10-lt-100
    [ -n "$SMOKE" ] && preset=digits-lt
    "$PY" -m bench.training_step --preset "$preset" ${SMOKE:+--steps 1 --rounds 1}
}
suite() {
    local only=()
    [ -n "$SMOKE" ] && only=(--quick --only 'kernel adamw_ema')
    "$PY" -m bench "${only[@]}" --resume --out "$OUT"
}
cifar() {
    local settings=()
    if [ -n "$SMOKE" ]; then
        settings=(--preset digits-lt --set extractor.steps=4 --set diffusion.steps=4 --set generate.filter=none
            --set generate.balance_to=20 --set classifier.steps=4)
    else
        settings=(--preset "$PRESET" --set "data.path=${DATA:?DATA=PATH of CIFAR-10 is needed}")
    fi
    "$PY" -m diffult.run "${settings[@]}" --run "$RUN"
    cp "$RUN"/{config.toml,metrics.json,report.html} "$RUN"/diffusion/metrics.jsonl "$OUT"
}
trace() { # shares of the kernels in sampling
    "$PY" -m diffult.generate --fast --run "$RUN" --per-class 8 --out "$RUN/traced" --profile
    gzip -c "$RUN/traced/trace.json" >"$OUT/trace.json.gz"
}
export -f setup tests tune kernels step suite cifar trace
export OUT RUN PY SMOKE WHEELS DATA PRESET 2>/dev/null || true

failed=()
for name in "${@:-${STEPS[@]}}"; do
    [[ " ${STEPS[*]} " == *" $name "* ]] || { echo "error: no step '$name'; there are: ${STEPS[*]}"; exit 2; }
    [ $# = 0 ] && [ -e "$OUT/$name.done" ] && continue
    echo "== $name"
    code=0
    timeout --signal=INT "$LIMIT" bash -euo pipefail -c "$name" > >(tee "$OUT/$name.log") 2>&1 || code=$?
    case $code in
        0) touch "$OUT/$name.done" ;;
        124 | 130) echo "$name: not finished within $LIMIT s; call it again and it goes on"; break ;;
        *) echo "error: $name failed (exit code $code), see $OUT/$name.log"; failed+=("$name") ;;
    esac
done
[ ${#failed[@]} = 0 ] || { echo "error: failed: ${failed[*]}"; exit 1; }
