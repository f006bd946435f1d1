#!/usr/bin/env bash
# Runs all measurements of one GPU in under 9 minutes:
#
#   benchmarks/gpu.sh [--out=DIR] [--peer=torch_sop.py] [--images=FOLDER] [--wheels=DIR]
#
# These are the precision of the step, the search, the parts of the step, its start from the cache,
# a training on the photos of FOLDER to compare with the step, the speed of the step for ViT-B, L
# and S (compared with the PyTorch yardstick if --peer names it), and the input. Measurements for
# which no time is left are skipped. DIR receives a log and the output of each. --wheels is a folder
# of wheels to install into DIR first, on a machine that has JAX but no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/arguments.sh
source launch/arguments.sh

out=runs/gpu peer="" images="" wheels=""
for argument in "$@"; do
  case "$argument" in
    -h | --help)
      show_help gpu.sh benchmarks
      exit
      ;;
    --out=*) out="${argument#*=}" ;;
    --peer=*) peer="${argument#*=}" ;;
    --images=*) images="${argument#*=}" ;;
    --wheels=*) wheels="${argument#*=}" ;;
    *)
      echo "error: unknown argument $argument; see the head of $0" >&2
      exit 2
      ;;
  esac
done
if ! command -v nvidia-smi > /dev/null; then
  echo "error: there is no nvidia-smi on this machine: an NVIDIA GPU and its driver are needed;" \
    "run this on a machine that has them" >&2
  exit 1
fi
mkdir -p "$out"
out="$(realpath "$out")"
began=$SECONDS
limit=530 # seconds for all measurements

if [[ -n "$wheels" ]]; then
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$out/site" "$wheels"/*.whl
  PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR="$out/compiled"
nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm --format=csv,noheader

# measure NAME SECONDS COMMAND...: runs the command if there is time, and stores its output. A
# command that fails or takes too long is reported, and the others still run.
measure() {
  local name="$1" most="$2" left=$((limit - SECONDS + began))
  shift 2
  if ((left < most / 2)); then
    echo "$name: skipped, because only $left s are left"
    return
  fi
  echo "== $name"
  if ! timeout $((most < left ? most : left)) "$@" > "$out/$name.txt" 2> "$out/$name.log"; then
    echo "failed: $(tail -n 3 "$out/$name.log")"
  fi
  tail -n 1 "$out/$name.txt"
}

# step NAME SECONDS ARGUMENTS...: times the step, alternating with the yardstick if there is one.
step() {
  local name="$1" most="$2"
  shift 2
  if [[ -n "$peer" ]]; then
    measure "$name" "$most" python3 benchmarks/step.py "$@" --rounds=1 --steps=20 \
      --peer="$peer" --device=cuda
  else
    measure "$name" "$most" python3 benchmarks/step.py "$@" --steps=20
  fi
}

measure precision_bfloat16 60 python3 benchmarks/precision.py --arch=vit_small
measure precision_float32 60 python3 benchmarks/precision.py --arch=vit_small --dtype=float32
measure search 60 python3 benchmarks/search.py --quick
measure parts_vitb 100 python3 benchmarks/step.py --arch=vit_base --batch=64 --method=paper \
  --parts --config.sop.search_precision=high
measure cached_vitb 60 python3 benchmarks/step.py --arch=vit_base --batch=64 --method=paper \
  --steps=20 --config.sop.search_precision=high
if [[ -n "$images" ]]; then
  measure train_vitb 120 python3 -m sop_jax.train --config=configs/imagenet_vitb16.py \
    --workdir="$out/train" --config.data.source=folder --config.data.path="$images" \
    --config.data.test_split=val --config.data.workers="$(nproc)" --config.batch_size=64 \
    --config.steps=100 --config.log_every=20 --config.eval_every=0 --config.checkpoint_every=0 \
    --config.sop.search_precision=high
  rm -rf "$out/train"
fi
step vitb 150 --arch=vit_base --batch=128 --compile
step vitb_closed_form 120 --arch=vit_base --batch=128 --compile --closed-form
measure vitl 90 python3 benchmarks/step.py --arch=vit_large --batch=64 --local-crops=8 --steps=10
step vits 120 --arch=vit_small --batch=256 --compile
measure input 60 python3 benchmarks/input.py --count=64 --rounds=2
rm -rf "$out/compiled" "$out/site"
echo "took $((SECONDS - began)) s"
