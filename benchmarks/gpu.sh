#!/usr/bin/env bash
# Runs all measurements of one GPU, in three calls of 9 minutes; each goes on where the last stopped:
#
#   benchmarks/gpu.sh [--out=DIR] [--peer=torch_sop.py] [--images=FOLDER] [--wheels=DIR]
#                     [--cache=DIR] [--only=NAME,...] [--seconds=N] [--rehearse]
#
# The first is a smoke test, without which nothing else runs. Then come the step of ViT-B with its
# parts and a trace, the same beside the PyTorch yardstick that --peer names, the same with other
# attention, products, rematerialisation and loops, ViT-L, the search, ViT-S, the precision of the
# step, a training on the photos of FOLDER, and the input.
#
#   --out=DIR       receives results.jsonl, with a line for each result as it comes, and gpu.log
#   --cache=DIR     of compiled programs and of the wheels, kept from call to call
#   --wheels=DIR    a folder of wheels to install there, on a machine that has JAX but no network
#   --only=NAME     runs these measurements only, again if they are done
#   --seconds=N     for this call; 530 by default
#   --rehearse      runs every measurement in a tiny size on a CPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/arguments.sh
source launch/arguments.sh

out=runs/gpu peer="" images="" wheels="" cache="" only="" seconds="" rehearse=""
for argument in "$@"; do
  case "$argument" in
    -h | --help)
      show_help gpu.sh benchmarks
      exit
      ;;
    --out=* | --peer=* | --images=* | --wheels=* | --cache=* | --only=* | --seconds=*)
      name="${argument#--}"
      printf -v "${name%%=*}" %s "${argument#*=}"
      ;;
    --rehearse) rehearse=1 ;;
    *)
      echo "error: unknown argument $argument; see the head of $0" >&2
      exit 2
      ;;
  esac
done
if [[ -z "$rehearse" ]] && ! command -v nvidia-smi > /dev/null; then
  echo "error: there is no nvidia-smi on this machine: an NVIDIA GPU and its driver are needed;" \
    "run this on a machine that has them, or add --rehearse" >&2
  exit 1
fi
mkdir -p "$out"
out="$(realpath "$out")"
cache="$(realpath -m "${cache:-$out.cache}")"
results="$out/results.jsonl" log="$out/gpu.log"
touch "$results"
names=(smoke vitb vitb_peer vitb_peer_closed vitb_xla vitb_full vitb_loop vitb_triton vitl search
  vits precision_bfloat16 precision_float32 train input)
for name in ${only//,/ }; do
  [[ " ${names[*]} " == *" $name "* ]] || {
    echo "error: there is no measurement $name; expected one of: ${names[*]}" >&2
    exit 2
  }
done
began=$SECONDS slow=1
[[ -z "$rehearse" ]] || slow=20 # times as slow as a GPU, at most
seconds="${seconds:-$((530 * slow))}"

if [[ -n "$wheels" && ! -d "$cache/site" ]]; then
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$cache/site" "$wheels"/*.whl
fi
[[ ! -d "$cache/site" ]] || PYTHONPATH="$cache/site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR="$cache/compiled"
if [[ -n "$rehearse" ]]; then
  export JAX_PLATFORMS=cpu
else
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm --format=csv,noheader |
    tee -a "$log"
fi

# keep NAME: copies lines to the log, and JSON to the results with the name, and the side if there
# are two. The last object is kept in the file LAST until the command has ended well.
keep() {
  local line side
  while IFS= read -r line; do
    echo "$line" >> "$log"
    case "$line" in
      "ours: {"* | "peer: {"*)
        side="${line%%:*}"
        echo "{\"name\": \"$1\", \"side\": \"$side\", ${line#*: \{}" >> "$results"
        ;;
      "{"*) echo "${line#\{}" > "$cache/last" ;;
    esac
  done
}

# measure NAME SECONDS COMMAND...: runs the command unless it is done or there is no time for it. A
# command that fails or takes too long is reported and tried again by the next call, and the others
# still run.
measure() {
  local name="$1" most=$(($2 * slow)) left=$((seconds - SECONDS + began)) start=$SECONDS code=0
  shift 2
  if [[ -n "$only" ]]; then
    [[ ",$only," == *",$name,"* ]] || return 0
  elif grep -q "^{\"name\": \"$name\", \"seconds\"" "$results"; then
    return 0
  fi
  if ((left < most / 2)); then
    echo "$name: left for the next call, because only $left s are left"
    return 0
  fi
  echo "== $name" | tee -a "$log"
  mkdir -p "$cache" && rm -f "$cache/last"
  timeout $((most < left ? most : left)) "$@" 2>> "$log" | keep "$name" || code=$?
  if ((code == 0)) && [[ -f "$cache/last" ]]; then
    echo "{\"name\": \"$name\", \"seconds\": $((SECONDS - start)), $(cat "$cache/last")" |
      tee -a "$results"
  else
    echo "{\"name\": \"$name\", \"failed\": $code}" | tee -a "$results"
    tail -n 3 "$log"
    return 1
  fi
}

# step NAME SECONDS ARGUMENTS...: times the step of a network.
step() {
  local name="$1" most="$2"
  shift 2
  measure "$name" "$most" python3 benchmarks/step.py "$@" "${size[@]}" || true
}

size=(--method=paper) tiny=() quick=(--quick) count=(--count=64 --rounds=2)
base=(--arch=vit_base --batch=64 --steps=20 --config.sop.search_precision=high)
if [[ -n "$rehearse" ]]; then
  tiny=(--config.model.size=custom --config.model.width=32 --config.model.depth=1
    --config.model.heads=2 --config.augment.global_size=32 --config.augment.local_size=16
    --config.sop.cls.memory=64 --config.sop.cls.anchors=16 --config.sop.patch.memory=32
    --config.sop.patch.anchors=8 --config.head.hidden=16 --config.head.dim=8 --config.mesh.data=1)
  size=(--batch=2 --local-crops=1 --steps=1 --warmup=0 "${tiny[@]}")
  quick=(--quick --rows=256 --anchors=32 --supports=2 --steps=1) count=(--count=8 --rounds=1)
fi

measure smoke 120 python3 benchmarks/smoke.py || exit 1
step vitb 150 "${base[@]}" --parts --trace
if [[ -n "$peer" ]]; then
  against=(--arch=vit_base --batch=128 --steps=20 --rounds=1 --peer="$peer")
  [[ -n "$rehearse" ]] && against+=(--device=cpu "${size[@]}") || against+=(--device=cuda --compile)
  measure vitb_peer 150 python3 benchmarks/step.py "${against[@]}" || true
  measure vitb_peer_closed 120 python3 benchmarks/step.py "${against[@]}" --closed-form || true
fi
step vitb_xla 100 "${base[@]}" --config.model.attention=xla
step vitb_full 100 "${base[@]}" --config.model.remat=full
step vitb_loop 100 "${base[@]}" --config.model.unroll=no
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_triton_gemm=false" step vitb_triton 100 "${base[@]}"
step vitl 150 --arch=vit_large --batch=64 --local-crops=8 --steps=10 \
  --config.sop.search_precision=high --config.model.remat=full
measure search 60 python3 benchmarks/search.py "${quick[@]}" || true
step vits 100 --arch=vit_small --batch=256 --steps=20 --config.sop.search_precision=high
for dtype in bfloat16 float32; do
  measure precision_$dtype 60 python3 benchmarks/precision.py --arch=vit_small --dtype=$dtype \
    --limit=0.2 "${tiny[@]}" || true
done
training=(--config=configs/digits.py --config.steps=2)
if [[ -z "$rehearse" ]]; then
  training=(--config=configs/imagenet_vitb16.py --config.data.source=folder
    --config.data.path="$images" --config.data.test_split=val --config.data.workers="$(nproc)"
    --config.batch_size=64 --config.steps=100 --config.sop.search_precision=high)
fi
if [[ -n "$images$rehearse" ]]; then
  rm -rf "$cache/train"
  training+=(--workdir="$cache/train" --config.log_every=1 --config.eval_every=0
    --config.checkpoint_every=0)
  # shellcheck disable=SC2016  # the inner shell expands these
  measure train 150 bash -c '"$@" && tail -n 1 "$0/metrics.jsonl"' "$cache/train" \
    python3 -m sop_jax.train "${training[@]}" || true
fi
measure input 60 python3 benchmarks/input.py "${count[@]}" || true
echo "took $((SECONDS - began)) s"
