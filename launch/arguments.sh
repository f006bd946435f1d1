# shellcheck shell=bash
# Sourced by the scripts beside it: how they show their help, take arguments, fail and run dry.
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

show_help() { # SCRIPT: the comment at its head
  sed -n -e 1d -e '/^# /!{/^#$/!q;}' -e 's/^# \{0,1\}//p' "launch/$1"
}

parse() {
  local options="$2" flags="$3" key
  script="$1"
  shift 3
  while (($#)); do
    key="${1#--}" && key="${key%%=*}"
    case "$1" in
      -h | --help) show_help "$script" && exit ;;
      --dry-run) dry=1 ;;
      --config= | --workdir= | --config.data.path=) die_empty "$key" ;;
      --config=* | --workdir=*) train+=("$1") && printf -v "$key" %s "${1#*=}" ;;
      --config.*=* | --config.* | --noconfig.*) train+=("$1") ;;
      --) train+=("${@:2}") && return ;;
      *)
        if [[ "$1" == --?*=* && " $options " == *" $key "* ]]; then
          [[ -n "${1#*=}" ]] || die_empty "$key"
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

die_empty() { # OPTION
  die "--$1 is empty: give it a value; is a variable not set?"
}

need() { # OPTION ...: each must have been given
  local option
  for option; do
    [[ -n "${!option}" ]] || die "--$option=... is missing"
  done
}

check_config() { # --config must be a recipe by its name, or a file of this machine
  local name="${config%%:*}" recipes=(configs/*.py)
  [[ ! -f "configs/$name.py" && ! -f "${name/#\~/"${HOME:-}"}" ]] || return 0
  recipes=("${recipes[@]#configs/}")
  die "there is no $name: --config must be a Python file or one of: ${recipes[*]%.py}"
}

check_size() { # FLAG VALUE SIZE...: die unless the value is one of the sizes; names the nearest
  local flag="$1" value="$2" wanted nearest="" size distance least=""
  wanted="$(chips "$2")"
  shift 2
  for size; do
    [[ "$size" != "$value" ]] || return 0
    distance=$(($(chips "$size") - wanted)) && distance="${distance#-}"
    [[ -n "$least" ]] && ((distance >= least)) || nearest="$size" least="$distance"
  done
  die "there is no --$flag=$value; did you mean $nearest?"
}

chips() { # SIZE: how many a size such as 4x8 or v6e-32 stands for
  local numbers="${1##*-}"
  echo $((${numbers//x/*}))
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
