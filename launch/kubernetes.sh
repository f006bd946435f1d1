#!/usr/bin/env bash
# Pretrains on Kubernetes, one pod a host: fills in launch/kubernetes.yaml and applies it.
#
#   launch/kubernetes.sh --image=IMAGE --hosts=4 --gpus=8 --config=NAME|FILE \
#       --workdir=gs://BUCKET/RUN [--config.KEY=VALUE ...]
#   launch/kubernetes.sh --image=IMAGE --tpu=tpu-v6e-slice --topology=4x8 ...   on GKE
#
#   --image=IMAGE       holds this checkout, installed; docs/launch.md says how to make it
#   --config=NAME|FILE  a recipe of configs/ by its name, or a file as the pods see it
#   --hosts=1           how many hosts with GPUs
#   --gpus=8            NVIDIA GPUs of a host
#   --tpu=KIND          tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, ...
#   --topology=AxB      of the slice, in chips; the number of hosts follows
#   --chips=4           TPU chips of a host
#   --spot              on GKE's spot nodes
#   --claim=NAME        a persistent volume claim, mounted at /data, for data and --workdir
#   --name=sop-jax      of Job and Service
#   --namespace=NAME    kubectl's own unless given
#   --dry-run           prints the manifest and starts nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/arguments.sh
source launch/arguments.sh
image="" hosts="" gpus="" tpu="" topology="" chips="" spot="" claim="" name=sop-jax namespace=""
(($#)) || set -- --help
parse kubernetes.sh "image hosts gpus tpu topology chips claim name namespace" "spot" "$@"
need image config workdir
[[ "$config" == /* ]] || check_config # other files are the image's or the volume's
[[ -n "$gpus" || -n "$tpu" ]] || die "--gpus=... or --tpu=... is missing"
[[ -z "$gpus" || -z "$tpu" ]] || die "--gpus and --tpu exclude each other"
if [[ -n "$tpu" ]]; then
  need topology
  [[ -z "$hosts" ]] || die "--hosts is for GPUs: of a TPU slice it follows from --topology"
else
  [[ -z "$topology$chips" ]] || die "--topology and --chips are for TPUs, and --gpus is given"
fi
hosts="${hosts:-1}" chips="${chips:-4}"
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]] || die "--name=$name cannot name a Service"
[[ "$workdir" == gs://?* || (-n "$claim" && "$workdir" == /data/?*) ]] ||
  die "--workdir must be gs://... or, with --claim, /data/...: the pods share no other disk"
for number in "$hosts" "${gpus:-1}" "$chips"; do
  [[ "$number" =~ ^[1-9][0-9]*$ ]] || die "$number is no number of hosts, GPUs or chips"
done

quoted() { # TEXT: as YAML writes it whatever is in it
  local quote="'"
  [[ "$1" != *$'\n'* ]] || die "an argument has more than one line"
  echo "'${1//$quote/"$quote$quote"}'"
}

list() { # ITEM ...: of YAML
  local IFS=,
  echo "[$*]"
}

devices="{nvidia.com/gpu: '$gpus'}" nodes="" taints=(nvidia.com/gpu google.com/tpu)
if [[ -n "$tpu" ]]; then
  [[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || die "--topology=$topology is not like 4x8"
  all=$((${topology//x/*}))
  ((all % chips == 0)) || die "hosts of $chips chips make no slice of $topology"
  case "$tpu" in
    tpu-v5-lite-* | tpu-v6e-*)
      check_size topology "$topology" 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16
      ;;
    tpu-v4-* | tpu-v5p-* | tpu7x*)
      [[ "$topology" == *x*x* ]] || die "--topology=$topology is not like 2x2x4, as $tpu has it"
      ;;
  esac
  hosts=$((all / chips)) devices="{google.com/tpu: '$chips'}"
  nodes="cloud.google.com/gke-tpu-accelerator: $(quoted "$tpu"),"
  nodes+=" cloud.google.com/gke-tpu-topology: $(quoted "$topology"),"
fi
if [[ -n "$spot" ]]; then
  nodes+=" cloud.google.com/gke-spot: 'true'"
  taints+=(cloud.google.com/gke-spot)
fi
tolerations=()
for taint in "${taints[@]}"; do
  tolerations+=("{key: $taint, operator: Exists, effect: NoSchedule}")
done
mounts=("{name: memory, mountPath: /dev/shm}") # where worker processes hand over images
volumes=("{name: memory, emptyDir: {medium: Memory}}")
if [[ -n "$claim" ]]; then
  mounts+=("{name: data, mountPath: /data}")
  volumes+=("{name: data, persistentVolumeClaim: {claimName: $(quoted "$claim")}}")
fi

# The index is Kubernetes' to fill in; any other dollar sign is doubled, which keeps it as it is.
command=(python -m sop_jax.train)
if ((hosts == 1)); then
  command+=("'--processes=1'")
else
  command+=("'--coordinator=$name-0.$name:8476'" "'--processes=$hosts'")
  command+=("'--process=\$(JOB_COMPLETION_INDEX)'")
fi
command+=("'--wait=600'")
for argument in "${train[@]}"; do
  command+=("$(quoted "${argument//\$/\$\$}")")
done

manifest="$(< launch/kubernetes.yaml)"
fill() { manifest="${manifest//__$1__/"$2"}"; } # NAME TEXT
fill NAME "$name"
fill HOSTS "$hosts"
fill BACKOFF "$((10 * hosts))"
fill NODES "{$nodes}"
fill TOLERATIONS "$(list "${tolerations[@]}")"
fill DEVICES "$devices"
fill MOUNTS "$(list "${mounts[@]}")"
fill VOLUMES "$(list "${volumes[@]}")"
fill IMAGE "$(quoted "$image")"
fill COMMAND "$(list "${command[@]}")"

if [[ -n "$dry" ]]; then
  echo "$manifest"
else
  kubectl apply ${namespace:+"--namespace=$namespace"} --filename=- <<< "$manifest"
fi
