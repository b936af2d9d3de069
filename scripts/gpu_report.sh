#!/usr/bin/env bash
# One stage of the checks that need a GPU: build, run, and leave a folder with the outcome.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: scripts/gpu_report.sh --stage STAGE [--out DIR] [--python PYTHON]
                             [--wheels DIR] [--text FILE]

Builds the package for the GPU of this machine and runs one stage, all in under 8 minutes:

  conformance   every device primitive, by csrc/tests/conformance*.cu, whose raw results are kept;
                then the CUDA kernels against float64 on a fixed grid of shapes
  tests         every test, the slow ones and those in tests/gpu too
  sanitizer     memcheck, racecheck, synccheck and initcheck over every op with a kernel
  tune          launch settings of the Triton kernels, measured; leaves the table that
                kernels/triton_settings.json should become
  bench         the benchmarks of the kernels
  generation    the benchmark of generation: tokens/s of GPT-2's sizes against transformers
  training      the benchmark of a training step, and a short training run of a real preset
                (tokens/s, MFU)

  --out DIR        the report folder; default gpu-report/STAGE. An earlier report in it is replaced:
                     machine.txt   hardware, versions, date, commit, and every command
                     summary.txt   each step's outcome, and what was left out and why
                     log.txt       all output
                     and what the stage itself writes (JUnit XML, JSON, sanitizer logs)
  --python PYTHON  the Python that has torch; default python3. The package is installed into it
                   (editable), or, where it takes no packages, into a venv in build/ that sees its.
  --wheels DIR     install the wheels in DIR into build/ first, for this script alone
  --text FILE      a text to train on in training; default: the sources of the standard library

Exit code: 0 when nothing that ran has failed; 1 when something did; 2 for a wrong option.

Without a GPU the stage runs as far as it can and says what it leaves out. The kernels are then
still compiled where there is an nvcc (CUDA_HOME or PATH).

Nothing is downloaded: the build takes torch, cmake, ninja and setuptools (77 or newer) from the
machine as it is. Bring a package that is missing, tyro for instance, as wheels: on a machine with
a network, for the Python and platform of the GPU machine (here 3.12 on x86-64),

  python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
      --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
      -d wheels tyro docstring-parser typeguard typing-extensions

(and liger-kernel, for the benchmarks to compare with), and then `--wheels wheels` (installed with
--no-index --no-deps, so name what a package needs too).
A text is any UTF-8 file, such as a book; bring it likewise and name it with --text.
HELP
}

die() {
  echo "gpu_report.sh: $*" >&2
  echo "try: scripts/gpu_report.sh --help" >&2
  exit 2
}

# ------------------------------------------------------------------------------ steps and outcomes

failures=0
cuda_home=${CUDA_HOME:-/usr/local/cuda}
deadline=470 # seconds after the start; the machine may be lent for 8 minutes

# step SECONDS NAME COMMAND...: runs a command with a time limit; a failure is noted and we go on.
step() {
  local limit=$1 name=$2 began=$SECONDS code=0 outcome
  shift 2
  if ((limit > deadline - SECONDS)); then limit=$((deadline - SECONDS)); fi
  echo
  echo "=== $name"
  printf '%q ' "$@" | tee -a "$out/machine.txt"
  echo | tee -a "$out/machine.txt"
  if ((limit < 5)); then
    code=1 outcome="not run: the time is up"
  else
    # As by Ctrl-C, after which pytest still writes what it has found.
    timeout --signal=INT --kill-after=15 "$limit" "$@" || code=$?
    case $code in
      0) outcome=passed ;;
      124 | 137) outcome="stopped after its limit of $limit s" ;;
      *) outcome="failed with exit code $code" ;;
    esac
  fi
  if ((code != 0)); then failures=$((failures + 1)); fi
  note "$name: $outcome ($((SECONDS - began)) s)"
  return "$code"
}

leave_out() { note "left out: $*"; }

note() { echo "$*" | tee -a "$out/summary.txt"; }

# ------------------------------------------------------------------------------ the machine

describe_machine() {
  {
    echo "date:    $(date --utc '+%Y-%m-%d %H:%M UTC')"
    echo "commit:  $(git rev-parse --verify HEAD 2>/dev/null || echo unknown)$(uncommitted)"
    echo "command: scripts/gpu_report.sh $arguments"
    echo "system:  $(uname -srm), $(nproc) CPUs"
    echo "nvcc:    $("$nvcc" --version 2>/dev/null | grep release || echo none)"
    "$python" - <<'PYTHON'
import importlib.metadata as metadata
import platform

names = ["torch", "triton", "numpy", "setuptools", "pytest", "pytest-benchmark", "tyro"]
versions = {name: "missing" for name in names}
for name in names:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(f"python:  {platform.python_version()};", ", ".join(map(" ".join, versions.items())))
PYTHON
    nvidia-smi 2>/dev/null || echo "GPU:     none (no nvidia-smi, or it fails)"
    echo "commands:"
  } >"$out/machine.txt" 2>&1
  cat "$out/machine.txt"
}

uncommitted() {
  if [[ -n $(git status --porcelain 2>/dev/null) ]]; then echo " with uncommitted changes"; fi
}

has_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }

has_modules() {
  "$python" - "$@" <<'PYTHON'
import importlib.util
import sys

missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
print(*missing)
sys.exit(bool(missing))
PYTHON
}

# ------------------------------------------------------------------------------ build

# A system's Python, or one of somebody else's, takes no packages: then a venv that sees all of its.
choose_python() {
  if "$python" - <<'PYTHON'; then
import os
import sys
import sysconfig

in_venv = sys.prefix != sys.base_prefix
managed = os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
sys.exit(not (os.access(sysconfig.get_path("purelib"), os.W_OK) and (in_venv or not managed)))
PYTHON
    return
  fi
  local packages purelib
  packages=$("$python" -c 'import sys; print(*(p for p in sys.path if "-packages" in p), sep="\n")')
  "$python" -m venv build/gpu-report-venv
  export PATH="$PWD/build/gpu-report-venv/bin:$PATH"
  python=$PWD/build/gpu-report-venv/bin/python
  purelib=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # The venv's own setuptools may be too old for this project; its parent's is what we were given.
  rm -rf "$purelib"/setuptools*
  echo "$packages" >"$purelib/parent.pth"
}

install_wheels() {
  local target=$PWD/build/gpu-report-wheels
  rm -rf "$target"
  step 60 "wheels" "$python" -m pip install --quiet --no-index --no-deps --no-compile \
    --target "$target" "$wheels"/*.whl || return
  export PYTHONPATH="$target${PYTHONPATH:+:$PYTHONPATH}"
}

build() {
  if [[ -n $gpu && -z ${ALMOSTGPT_CUDA_ARCHS:-} ]]; then
    # Hopper's own instructions need 90a; other GPUs are served by their plain architecture.
    ALMOSTGPT_CUDA_ARCHS=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u |
      sed 's/\.//; s/^90$/90a/; s/$/-real/' | paste -sd ';')
    export ALMOSTGPT_CUDA_ARCHS
  fi
  if [[ -n $gpu || -x $nvcc ]]; then export ALMOSTGPT_CUDA=ON; fi
  if [[ -z $gpu && ! -x $nvcc ]]; then leave_out "compiling the CUDA kernels: there is no nvcc"; fi
  echo "ALMOSTGPT_CUDA=${ALMOSTGPT_CUDA:-AUTO} ALMOSTGPT_CUDA_ARCHS=${ALMOSTGPT_CUDA_ARCHS:-}" |
    tee -a "$out/machine.txt"
  step 240 "build" "$python" -m pip install --verbose --no-build-isolation --no-deps -e .
}

# ------------------------------------------------------------------------------ the stages

# Begins as a console script does, without this folder in sys.path: there transformers would take
# the folder kernels/ for the package of that name.
readonly console='import sys; del sys.path[0]; '

run_pytest() { # run_pytest SECONDS NAME ARGUMENTS...
  step "$1" "$2" "$python" -c "$console import pytest; sys.exit(pytest.console_main())" \
    --color=no "${@:3}"
}

stage_conformance() {
  conformance_program || true
  if [[ -z $gpu ]]; then
    leave_out "the kernels against float64: they need a GPU; the tests are only collected"
    run_pytest 60 "collect" tests/gpu -m conformance --collect-only -q || true
    return
  fi
  run_pytest 200 "conformance" tests/gpu -m conformance -q --junitxml="$out/conformance.xml" || true
  run_pytest 150 "attention" tests/kernels/test_flash_attention_kernels.py -k "cuda or combination" -q \
    --junitxml="$out/attention.xml" || true
  run_pytest 100 "cache" tests/kernels/test_kv_cache.py -k "cuda or gpu" -q --junitxml="$out/cache.xml" || true
}

# The device primitives check themselves in a program of their own; their raw outputs are kept, for
# the emulator to be held to.
conformance_program() {
  local program=build/conformance arch=${ALMOSTGPT_CUDA_ARCHS:-90a} sources=(csrc/tests/conformance.cu)
  if [[ ! -x $nvcc ]]; then return; fi
  arch=${arch%%[;-]*}
  # Hopper's own primitives are in files that only 90a compiles.
  if [[ $arch == 90a ]]; then sources=(csrc/tests/conformance*.cu); fi
  step 200 "compile ${sources[*]}" "$nvcc" -std=c++17 -O3 -I csrc \
    -gencode "arch=compute_$arch,code=sm_$arch" "${sources[@]}" -o "$program" || return
  if [[ -z $gpu ]]; then
    leave_out "running $program: it needs a GPU"
    return
  fi
  mkdir -p build/conformance-raw
  step 60 "run $program" "$program" --dump build/conformance-raw || true
  tar -C build/conformance-raw -czf "$out/conformance-raw.tar.gz" .
}

stage_tests() {
  if [[ -z $gpu ]]; then leave_out "tests/gpu: they need a GPU and skip themselves"; fi
  # First what only a GPU can tell. The project's own options leave out the slow ones.
  if [[ -n $gpu ]]; then
    run_pytest 220 "tests/gpu" tests/gpu -m "slow or not slow" -q -rfEs --durations=15 \
      --junitxml="$out/tests-gpu.xml" || true
  fi
  run_pytest 400 "tests" tests -m "slow or not slow" ${gpu:+--ignore=tests/gpu} -q -rfEs --durations=15 \
    --junitxml="$out/tests.xml" || true
}

stage_sanitizer() {
  local workload=tests/gpu/sanitizer_workload.py sanitizer tool
  sanitizer=$(command -v compute-sanitizer || echo "$cuda_home/bin/compute-sanitizer")
  if [[ -z $gpu ]]; then
    leave_out "memcheck, racecheck, synccheck, initcheck: they need a GPU"
    return
  fi
  if [[ ! -x $sanitizer ]]; then
    note "sanitizer: failed: compute-sanitizer is neither in PATH nor in CUDA_HOME/bin"
    failures=$((failures + 1))
    return
  fi
  # Each tensor an allocation of its own, so that an access just beside it is seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  step 60 "workload alone" "$python" "$workload" || return 0
  for tool in memcheck racecheck synccheck initcheck; do
    step 90 "$tool" "$sanitizer" --tool "$tool" --error-exitcode 1 --print-limit 20 \
      --log-file "$out/$tool.txt" "$python" "$workload" || true
    tail -n 5 "$out/$tool.txt" 2>/dev/null || true
  done
}

stage_bench() {
  if [[ -z $gpu ]]; then leave_out "every figure of a GPU: these are the small CPU sizes"; fi
  local missing file name limit
  if missing=$(has_modules pytest_benchmark); then
    # A run for each file: one that is stopped takes no other's tables with it.
    for file in benchmarks/test_*.py; do
      name=$(basename "$file" .py) limit=70
      if [[ $name == test_training_step || $name == test_generation ]]; then continue; fi # stages of their own
      if [[ $name == test_linear_cpu && -n $gpu ]]; then continue; fi # of processors
      if [[ $name == test_attention || $name == test_kv_cache || $name == test_rms_norm ]]; then limit=200; fi
      run_pytest "$limit" "$name" "$file" --benchmark-only -q --save-results \
        --results-dir "$out/${name#test_}" || true
    done
  else
    leave_out "the benchmarks: missing $missing (see --help, --wheels)"
  fi
}

stage_tune() {
  if [[ -z $gpu ]]; then
    leave_out "the settings: they are measured on a GPU"
    return
  fi
  step 420 "tune" "$python" scripts/tune_triton.py || true
  cp kernels/triton_settings.json "$out/"
}

stage_generation() {
  if [[ -z $gpu ]]; then leave_out "every figure of a GPU: these are the small CPU sizes"; fi
  race 420 generation
}

# One benchmark that has a stage of its own: LIMIT (seconds) NAME.
race() {
  local missing
  if missing=$(has_modules pytest_benchmark); then
    run_pytest "$1" "$2" "benchmarks/test_$2.py" --benchmark-only -q --save-results \
      --results-dir "$out/$2" || true
  else
    leave_out "the benchmark: missing $missing (see --help, --wheels)"
  fi
}

stage_training() {
  local missing
  if [[ -z $gpu ]]; then leave_out "every figure of a GPU: these are the small CPU sizes"; fi
  race 280 training_step
  if missing=$(has_modules tyro rich tiktoken safetensors yaml matplotlib); then
    train_shortly || true
  else
    leave_out "the training run: missing $missing (see --help, --wheels)"
  fi
}

# The speed of a real preset. Its last line of metrics.jsonl is free of compilation and warm-up.
train_shortly() {
  local run="$out/training" memory
  local options=(--out "$run" --training.log_every 2 --training.eval_batches 1
    --training.eval_every 0 --checkpoint.every 1000000)
  if [[ -n $text ]]; then options+=(--data.path "$text"); else options+=(--data.corpus stdlib); fi
  if [[ -n $gpu ]]; then
    memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | sort -n | sed q)
    # Bytes, because GPT-2's vocabulary is a download; the output layer keeps its full width, so the
    # step costs what it costs with it. A smaller card takes the same step in smaller pieces.
    options+=(--config gpt2-124m --data.tokenizer byte --model.vocab_size 50257 --training.steps 20)
    if ((memory < 60000)); then options+=(--training.batch_size 4 --training.accumulate 128); fi
  else
    options+=(--config shakespeare-char-cpu --training.steps 40)
  fi
  rm -rf "$run"
  ALMOSTGPT_CACHE="$PWD/build/gpu-report-cache" step 150 "training run" \
    "$python" -c "$console from almostgpt.cli.main import train_main; sys.exit(train_main())" \
    "${options[@]}" || return
  cp "$run/metrics.jsonl" "$out/training.jsonl"
  note "training: $(tail -n 1 "$out/training.jsonl")"
  rm -rf "$run" # half a GB of weights
}

# ------------------------------------------------------------------------------ options

main() {
  choose_python
  nvcc=$(command -v nvcc || echo "$cuda_home/bin/nvcc")
  if has_gpu; then gpu=yes; else gpu=""; fi
  describe_machine
  if [[ -n $wheels ]]; then install_wheels; fi
  if [[ -z $gpu ]]; then leave_out "all that needs a GPU: torch.cuda.is_available() is False"; fi
  if build; then "stage_$stage"; fi
  echo
  echo "=== $stage: $failures failed, after $SECONDS s; the report is in $out"
  cat "$out/summary.txt"
  return $((failures > 0))
}

arguments=$*
stage="" out="" wheels="" text="" python=python3
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --stage | --out | --wheels | --text | --python)
      if (($# < 2)); then die "$1 needs a value"; fi
      declare "${1#--}=$2"
      shift 2
      ;;
    *) die "unknown option $1" ;;
  esac
done
case $stage in
  conformance | tests | sanitizer | tune | bench | generation | training) ;;
  "") die "--stage is missing" ;;
  *) die "no stage named $stage; there are conformance, tests, sanitizer, tune, bench, generation and training" ;;
esac
python=$(command -v "$python") || die "--python $python: there is no such program"
"$python" -c 'import torch' 2>/dev/null || die "$python has no torch; name one that has: --python"
if [[ -n $wheels ]]; then wheels=$(realpath -e "$wheels") || die "--wheels: no such folder"; fi
if [[ -n $text ]]; then text=$(realpath -e "$text") || die "--text: no such file"; fi
if [[ -n $out ]]; then out=$(realpath -m "$out"); fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${out:-$PWD/gpu-report/$stage}
rm -f "$out"/{machine,summary,log}.txt
mkdir -p "$out" build
main 2>&1 | tee "$out/log.txt"
