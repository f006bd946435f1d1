#!/usr/bin/env bash
# Pretrains on Kubernetes, with one pod per host: fills in launch/kubernetes.yaml and applies it.
#
#   launch/kubernetes.sh --image=IMAGE --hosts=4 --gpus=8 --config=NAME|FILE \
#       --workdir=gs://BUCKET/RUN [--config.KEY=VALUE ...]
#   launch/kubernetes.sh --image=IMAGE --tpu=tpu-v6e-slice --topology=4x8 ...   on GKE
#
#   --image=IMAGE       an image with this checkout installed, built from launch/Dockerfile
#   --config=NAME|FILE  the name of a recipe in configs/, or a file as the pods see it
#   --hosts=1           the number of hosts with GPUs
#   --gpus=8            the number of NVIDIA GPUs per host
#   --tpu=KIND          tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, ...
#   --topology=AxB      the topology of the slice in chips; it determines the number of hosts
#   --chips=4           the number of TPU chips per host
#   --spot              uses GKE's spot nodes
#   --claim=NAME        a persistent volume claim, mounted at /data, for data and --workdir
#   --name=sop-jax      the name of the Job and the Service
#   --namespace=NAME    the namespace; kubectl's default if it is not given
#   --dry-run           prints the manifest without starting anything
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/arguments.sh
source launch/arguments.sh
image="" hosts="" gpus="" tpu="" topology="" chips="" spot="" claim="" name=sop-jax namespace=""
(($#)) || set -- --help
parse kubernetes.sh "image hosts gpus tpu topology chips claim name namespace" "spot" "$@"
need image config workdir
[[ "$config" == /* ]] || check_config # absolute paths are in the image or the volume
[[ -n "$gpus" || -n "$tpu" ]] || die "--gpus=... or --tpu=... is missing"
[[ -z "$gpus" || -z "$tpu" ]] || die "--gpus and --tpu exclude each other; give one of them"
if [[ -n "$tpu" ]]; then
  need topology
  [[ -z "$hosts" ]] || die "--hosts is for GPUs; --topology determines the hosts of a TPU slice"
else
  [[ -z "$topology$chips" ]] || die "--topology and --chips are for TPUs, but --gpus is given"
fi
hosts="${hosts:-1}" chips="${chips:-4}"
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]] ||
  die "--name=$name is not a valid name of a Service; use lower-case letters, digits and dashes"
[[ "$workdir" == gs://?* || (-n "$claim" && "$workdir" == /data/?*) ]] ||
  die "--workdir must be gs://... or, with --claim, /data/..., because the pods share no other disk"
for number in "$hosts" "${gpus:-1}" "$chips"; do
  [[ "$number" =~ ^[1-9][0-9]*$ ]] || die "$number is not a number of hosts, GPUs or chips"
done

quoted() { # TEXT: prints it as a quoted YAML string
  local quote="'"
  [[ "$1" != *$'\n'* ]] || die "an argument has more than one line; write it on one line"
  echo "'${1//$quote/"$quote$quote"}'"
}

list() { # ITEM ...: prints a YAML list
  local IFS=,
  echo "[$*]"
}

devices="{nvidia.com/gpu: '$gpus'}" nodes="" taints=(nvidia.com/gpu google.com/tpu)
if [[ -n "$tpu" ]]; then
  [[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
    die "--topology=$topology must have the form 4x8"
  all=$((${topology//x/*}))
  ((all % chips == 0)) || die "hosts of $chips chips cannot form a slice of $topology; set --chips"
  case "$tpu" in
    tpu-v5-lite-* | tpu-v6e-*)
      check_size topology "$topology" 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16
      ;;
    tpu-v4-* | tpu-v5p-* | tpu7x*)
      [[ "$topology" == *x*x* ]] || die "--topology=$topology must have the form 2x2x4 for $tpu"
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
mounts=("{name: memory, mountPath: /dev/shm}") # through which input workers hand over images
volumes=("{name: memory, emptyDir: {medium: Memory}}")
if [[ -n "$claim" ]]; then
  mounts+=("{name: data, mountPath: /data}")
  volumes+=("{name: data, persistentVolumeClaim: {claimName: $(quoted "$claim")}}")
fi

command=(python -m sop_jax.train)
if [[ -n "$gpus" ]]; then
  # shellcheck disable=SC2016  # it is for the shell of the pod
  flags='source launch/flags.sh && use_gpu_flags && exec "$@"'
  command=(bash -c "$(quoted "$flags")" bash "${command[@]}")
fi
# Kubernetes substitutes the index; all other dollar signs are doubled, which escapes them.
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
