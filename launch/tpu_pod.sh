#!/usr/bin/env bash
# Pretrains on a Cloud TPU slice of one or many hosts, from this machine, through gcloud.
#
#   launch/tpu_pod.sh ACTION --zone=ZONE [--type=v6e-64] [--spot] [--config=NAME
#       --workdir=gs://BUCKET/RUN --config.KEY=VALUE ...]
#
#   up        runs create, install and run; then watches, and repeats them after every preemption,
#             until the training is finished (exit code 0) or has failed (1 or 2). Ctrl-C ends only
#             the watching; the same command continues it
#   create    requests the slice and waits for it
#   install   copies this checkout to every host and installs it there
#   run       starts the training on every host; it does not depend on this machine
#   status    reports the state of the slice and of the training
#   stop      makes the training save and end (end `up` first, which would restart it)
#   delete    deletes the slice
#
#   --config=NAME       the name or file of a recipe in configs/; --config.KEY=VALUE changes it
#   --name=sop-jax      the name of the slice
#   --project=ID        the project; gcloud's default if it is not given
#   --type=TYPE         v5litepod-64, v5p-128, v6e-64, ...; it determines the number of hosts
#   --runtime=VERSION   the version of the hosts' software; by default that for the type
#   --spot              cheaper, but can be preempted
#   --prepare=COMMAND   run by every host after the installation, for example to mount data
#   --create=FLAG       an additional flag for gcloud's create, for example --create=--reserved
#   --poll=60           the number of seconds between checks
#   --release           makes `up` delete the slice when it ends, for whatever reason
#   --dry-run           prints the commands without starting anything
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/arguments.sh
source launch/arguments.sh
actions="up create install run status stop delete"
name=sop-jax zone="" type="" project="" runtime="" spot="" prepare="" create="" poll=60
release=""
(($#)) || set -- --help
parse tpu_pod.sh "name zone type project runtime prepare create poll" "spot release" "$@"
need zone
case "$action" in
  up) need type config workdir ;;
  run) need config workdir ;;
  create) need type ;;
  "") die "the action is missing; give one of: $actions" ;;
esac
if [[ -n "$workdir$config" ]]; then # before anything costs money
  [[ "$workdir" == gs://?* ]] || die "--workdir must be gs://..., because the hosts share no disk"
  check_config
  [[ "$config" == configs/* || "$config" != */* ]] ||
    die "--config must be a file in configs/, which is copied to the hosts, not $config"
fi
kind="${type%%-*}" sizes=()
case "$kind" in # sizes are chips for v5litepod and v6e, and TensorCores for the others
  v5litepod) software=v2-alpha-tpuv5-lite sizes=(1 4 8 16 32 64 128 256) ;;
  v6e) software=v2-alpha-tpuv6e sizes=(1 4 8 16 32 64 128 256) ;;
  v5p) software=v2-alpha-tpuv5 sizes=(8 16 32 64 {128..12288..128}) ;;
  v4) software=tpu-ubuntu2204-base sizes=(8 16 32 64 {128..8192..128}) ;;
  v3) software=tpu-ubuntu2204-base sizes=(8 32 64 128 256 512 1024 2048) ;;
  v2) software=tpu-ubuntu2204-base sizes=(8 32 64 128 256 512) ;;
  "") software="" ;;
  *) die "there is no --type=$type; give v2, v3, v4, v5litepod, v5p or v6e and a size: v6e-64" ;;
esac
if [[ -n "$type" ]]; then
  [[ "$type" =~ ^[^-]+-[1-9][0-9]*$ ]] || die "--type=$type has no valid size; give one: v6e-64"
  check_size type "$type" "${sizes[@]/#/$kind-}"
fi
runtime="${runtime:-$software}"
[[ "$poll" =~ ^[0-9]+([.][0-9]+)?$ ]] || die "--poll=$poll is not a number of seconds"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# The commands that run on the hosts. A training holds the lock while it runs. uv, which installs
# Python where that of the hosts is too old, checks what it downloads.
uv=uv==0.13.9
idle="flock --nonblock run.lock true"
setup="mkdir -p sop_jax && cd sop_jax \
&& { $idle || { echo a training is running here; exit 1; }; } \
&& tar -xzf ../sop_jax.tgz \
&& { [ -x .$uv/bin/uv ] || python3 -m pip install --quiet --target=.$uv $uv; } \
&& { [ -x .venv/bin/python ] || .$uv/bin/uv venv --quiet --python='>=3.11,<3.13' .venv; } \
&& .$uv/bin/uv pip install --quiet -e '.[tpu,gcs]'"
training="$(printf '%q ' .venv/bin/python -m sop_jax.train --wait=600 ${train[@]+"${train[@]}"})"
training="$(printf %q "$training; echo \$? > run.exit")"
start="cd sop_jax && { flock --nonblock 9 || { echo it is already running; exit 0; }; \
rm -f run.exit; \
nohup bash -c $training >> run.log 2>&1 < /dev/null & } 9> run.lock"
look="cd sop_jax 2> /dev/null || { echo absent; exit 0; }; \
tail -n 5 run.log 2> /dev/null | tr '\\r' '\\n' | tail -n 3; echo; \
if $idle; then cat run.exit 2> /dev/null || echo absent; else echo running; fi"

tpus() { call gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"}; }
on() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; } # WORKER COMMAND

state() { # prints that of the slice (READY, PREEMPTED, ...), or of its request, or NONE or UNKNOWN
  local kind field=state
  for kind in tpu-vm queued-resources; do
    tpus "$kind" describe "$name" --format="value($field)" 2> "$scratch/error" && return
    if ! grep -qi "not.found" "$scratch/error"; then
      cat "$scratch/error" >&2
      echo UNKNOWN && return
    fi
    field=state.state
  done
  echo NONE
}

request() {
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" ${spot:+--spot} ${create:+"$create"}
}

install() {
  local archive="$scratch/sop_jax.tgz"
  call tar -czf "$archive" --exclude=__pycache__ setup.py pyproject.toml sop_jax configs &&
    tpus tpu-vm scp "$archive" "$name:" --worker=all &&
    on all "$setup${prepare:+ && { $prepare; \}}"
}

give_back() { tpus queued-resources delete "$name" --force --quiet; }

finish() { # CODE REASON: ends `up` and `create`
  echo "$2"
  if [[ -n "$release" ]]; then
    give_back
  else
    echo "the slice costs money until launch/tpu_pod.sh delete --name=$name --zone=$zone"
  fi
  exit "$1"
}

attend() { # does the work of `up` or `create`, from the current state
  local now report code="" before mine="" tries=0
  while true; do
    now="$(state)" before="$code" code=""
    echo "$(date +%T) $name: $now"
    case "$now" in
      NONE) request ;;
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED) give_back && mine="" tries=0 ;;
      FAILED) finish 1 "the request failed; to see why, run: gcloud compute tpus queued-resources describe $name" ;;
      READY)
        [[ "$action" == up ]] || exit 0
        report="$(on 0 "$look")" || report=unreachable
        echo "$report"
        code="${report##*$'\n'}"
        if [[ "$code" == running ]]; then
          mine=1
        elif [[ "$code" != unreachable && (-z "$mine" || "$code" == "$before") ]]; then
          # Checked twice, because after a preemption the training ends before the slice does.
          case "$mine$code" in
            10) finish 0 "finished" ;;
            11 | 12)
              on 0 "tail -n 40 sop_jax/run.log" || true
              finish "$code" "the training ended with $code; the log above says what to fix"
              ;;
            1130) tries=0 ;; # saved, so it makes progress
          esac
          ((++tries <= 10)) || finish 1 "the training crashed 10 times on this slice"
          install && on all "$start" && mine=1
          code=""
        fi
        ;;
    esac
    sleep "$poll"
  done
}

case "$action${dry:+ dry}" in
  up | create) attend ;;
  "create dry") request && state ;;
  "up dry")
    request && state && install && on all "$start" && on 0 "$look"
    echo "# every $poll s the state and the last command; after a preemption this, then all again:"
    give_back
    ;;
  install*) install ;;
  run*) on all "$start" ;;
  status*)
    now="$(state)" && echo "$now"
    [[ -z "$dry" && "$now" != READY ]] || on 0 "$look"
    ;;
  stop*) on 0 "pkill -TERM -f '^[.]venv/bin/python -m sop_jax[.]train'" ;;
  delete*) give_back ;;
esac
