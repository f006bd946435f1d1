# shellcheck shell=bash
# Sourced by the scripts beside it that start trainings: how they take arguments, fail and run dry.
#
# `parse SCRIPT "OPTION ..." "FLAG ..." "$@"` sets variables of the names of a script's options
# (which have a value) and flags (which have none), and `action` to the one given of `actions`; what
# is the training's goes to `train`.

# shellcheck disable=SC2034  # these are for the script that sources this
script="" dry="" config="" workdir="" train=() actions="" action=""

die() { # MESSAGE [EXIT CODE]
  echo "error: $1 (launch/$script --help says what there is)" >&2
  exit "${2:-2}"
}

parse() {
  local options="$2" flags="$3" key
  script="$1"
  shift 3
  while (($#)); do
    key="${1#--}" && key="${key%%=*}"
    case "$1" in
      --help) # the comment at the script's head
        sed -n -e 1d -e '/^# /!{/^#$/!q;}' -e 's/^# \{0,1\}//p' "launch/$script"
        exit
        ;;
      --dry-run) dry=1 ;;
      --config=* | --workdir=*) train+=("$1") && printf -v "$key" %s "${1#*=}" ;;
      --config.*=* | --config.* | --noconfig.*) train+=("$1") ;;
      --) train+=("${@:2}") && return ;;
      *)
        if [[ "$1" == --?*=* && " $options " == *" $key "* ]]; then
          printf -v "$key" %s "${1#*=}"
        elif [[ "$1" == "--$key" && " $flags " == *" $key "* ]]; then
          printf -v "$key" 1
        elif [[ -z "$action" && " $actions " == *" $1 "* ]]; then
          action="$1"
        else
          die "unknown option $1"
        fi
        ;;
    esac
    shift
  done
}

need() { # OPTION ...: each must have been given
  local option
  for option; do
    [[ -n "${!option}" ]] || die "--$option=... is missing"
  done
}

gpu_extras() { # prints which extras of setup.py this training needs on GPUs
  case "${train[*]}" in
    *gs://*) echo cuda,gcs ;;
    *) echo cuda ;;
  esac
}

call() { # COMMAND ...: runs it, or prints it in a dry run as one could type it
  local quote="'" escaped="'\\''" line="" word
  if [[ -z "$dry" ]]; then
    "$@"
    return
  fi
  for word; do
    [[ "$word" =~ ^[[:alnum:]_./:=,@%+-]+$ ]] || word="'${word//$quote/"$escaped"}'"
    line+=" $word"
  done
  echo "${line# }"
}
