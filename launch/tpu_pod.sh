#!/usr/bin/env bash
# Pretrains on a Cloud TPU slice of one or many hosts, from this machine, through gcloud.
#
#   launch/tpu_pod.sh ACTION --zone=ZONE [--type=v6e-64] [--spot] [--config=NAME
#       --workdir=gs://BUCKET/RUN --config.KEY=VALUE ...]
#
#   up        create, install and run; then watches, and does it again after every preemption, until
#             the training is finished (exit code 0) or needs a person (1 or 2); Ctrl-C ends only
#             the watching, and the same command takes it up again
#   create    asks for the slice and waits for it
#   install   copies this checkout to every host and installs it there
#   run       starts the training on every host; it lives on when this machine is switched off
#   status    says how slice and training are
#   stop      has the training save and end (end `up` first: it would start it again)
#   delete    gives the slice back
#
#   --config=NAME       a recipe of configs/, by its name or file; --config.KEY=VALUE changes it
#   --name=sop-jax      of the slice
#   --project=ID        gcloud's own unless given
#   --type=TYPE         v5litepod-64, v5p-128, v6e-64, ...; the number of hosts follows
#   --runtime=VERSION   of the hosts' software; follows from the type unless given
#   --spot              cheaper, and may be preempted
#   --prepare=COMMAND   what every host runs after the install, such as a mount of data
#   --create=FLAG       one more flag for gcloud's create, such as --create=--reserved
#   --poll=60           seconds between two looks
#   --release           `up` gives the slice back at its end, whichever
#   --dry-run           prints the commands and starts nothing
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
  "") die "one of these is missing: $actions" ;;
esac
if [[ -n "$workdir$config" ]]; then # before anything costs money
  [[ "$workdir" == gs://?* ]] || die "--workdir must be gs://...: the hosts share no disk"
  check_config
  [[ "$config" == configs/* || "$config" != */* ]] ||
    die "--config must be a file of configs/, which is copied to the hosts, not $config"
fi
kind="${type%%-*}" sizes=()
case "$kind" in # the numbers are chips of v5litepod and v6e, of the others TensorCores
  v5litepod) software=v2-alpha-tpuv5-lite sizes=(1 4 8 16 32 64 128 256) ;;
  v6e) software=v2-alpha-tpuv6e sizes=(1 4 8 16 32 64 128 256) ;;
  v5p) software=v2-alpha-tpuv5 sizes=(8 16 32 64 {128..12288..128}) ;;
  v4) software=tpu-ubuntu2204-base sizes=(8 16 32 64 {128..8192..128}) ;;
  v3) software=tpu-ubuntu2204-base sizes=(8 32 64 128 256 512 1024 2048) ;;
  v2) software=tpu-ubuntu2204-base sizes=(8 32 64 128 256 512) ;;
  "") software="" ;;
  *) die "there is no --type=$type; kinds are v2, v3, v4, v5litepod, v5p and v6e, as in v6e-64" ;;
esac
if [[ -n "$type" ]]; then
  [[ "$type" =~ ^[^-]+-[1-9][0-9]*$ ]] || die "--type=$type has no size, as v6e-64 has"
  check_size type "$type" "${sizes[@]/#/$kind-}"
fi
runtime="${runtime:-$software}"
[[ "$poll" =~ ^[0-9]+([.][0-9]+)?$ ]] || die "--poll=$poll is no number of seconds"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# What the hosts are told. A training holds the lock for as long as it lives. The Python that hosts
# come with is older than the project's.
idle="flock --nonblock run.lock true"
setup="mkdir -p sop_jax && cd sop_jax && { $idle || { echo a training runs here; exit 1; }; } \
&& tar -xzf ../sop_jax.tgz \
&& { [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh; } \
&& { [ -x .venv/bin/python ] || ~/.local/bin/uv venv --quiet --python=3.12 .venv; } \
&& ~/.local/bin/uv pip install --quiet -e '.[tpu,gcs]'"
training="$(printf '%q ' .venv/bin/python -m sop_jax.train --wait=600 ${train[@]+"${train[@]}"})"
training="$(printf %q "$training; echo \$? > run.exit")"
start="cd sop_jax && { flock --nonblock 9 || { echo it runs already; exit 0; }; rm -f run.exit; \
nohup bash -c $training >> run.log 2>&1 < /dev/null & } 9> run.lock"
look="cd sop_jax 2> /dev/null || { echo absent; exit 0; }; \
tail -n 5 run.log 2> /dev/null | tr '\\r' '\\n' | tail -n 3; echo; \
if $idle; then cat run.exit 2> /dev/null || echo absent; else echo running; fi"

tpus() { call gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"}; }
on() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; } # WORKER COMMAND

state() { # of the slice: READY, PREEMPTED, ...; before it is there, of the request; NONE; UNKNOWN
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

finish() { # EXIT CODE WHY: the end of `up` and `create`
  echo "$2"
  if [[ -n "$release" ]]; then
    give_back
  else
    echo "the slice costs until launch/tpu_pod.sh delete --name=$name --zone=$zone"
  fi
  exit "$1"
}

attend() { # does what `up` or `create` is for, from whatever there is
  local now report code="" before mine="" tries=0
  while true; do
    now="$(state)" before="$code" code=""
    echo "$(date +%T) $name: $now"
    case "$now" in
      NONE) request ;;
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED) give_back && mine="" tries=0 ;;
      FAILED) finish 1 "gcloud compute tpus queued-resources describe $name says why" ;;
      READY)
        [[ "$action" == up ]] || exit 0
        report="$(on 0 "$look")" || report=unreachable
        echo "$report"
        code="${report##*$'\n'}"
        if [[ "$code" == running ]]; then
          mine=1
        elif [[ "$code" != unreachable && (-z "$mine" || "$code" == "$before") ]]; then
          # Looked at twice: after a preemption the training ends before the slice does.
          case "$mine$code" in
            10) finish 0 "finished" ;;
            11 | 12)
              on 0 "tail -n 40 sop_jax/run.log" || true
              finish "$code" "the training ended with $code: see above what is to be mended"
              ;;
            1130) tries=0 ;; # saved, so that it does get on
          esac
          ((++tries <= 10)) || finish 1 "started 10 times on this slice, and it crashes"
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
    echo "# every $poll s state and last command again; after a preemption this, and all anew:"
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
