# shellcheck shell=bash
# Sourced by the other scripts in this folder: help, arguments, errors and dry runs.
#
# `parse SCRIPT "OPTION ..." "FLAG ..." "$@"` sets variables with the names of a script's options
# (which take a value) and flags (which do not), and `action` to the one of `actions` that is given;
# arguments of the training are collected in `train`.

# shellcheck disable=SC2034  # used by the scripts that source this file
script="" dry="" config="" workdir="" train=() actions="" action=""

die() { # MESSAGE [EXIT CODE]
  echo "error: $1 (see launch/$script --help)" >&2
  exit "${2:-2}"
}

show_help() { # SCRIPT [FOLDER]: prints the comment at its beginning
  sed -n -e 1d -e '/^# /!{/^#$/!q;}' -e 's/^# \{0,1\}//p' "${2:-launch}/$1"
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
  die "--$1 is empty; give it a value (is a shell variable not set?)"
}

need() { # OPTION ...: dies unless each was given
  local option
  for option; do
    [[ -n "${!option}" ]] || die "--$option=... is missing"
  done
}

check_config() { # dies unless --config is the name of a recipe or a file on this machine
  local name="${config%%:*}" recipes=(configs/*.py)
  [[ ! -f "configs/$name.py" && ! -f "${name/#\~/"${HOME:-}"}" ]] || return 0
  recipes=("${recipes[@]#configs/}")
  die "there is no recipe $name; --config must be a Python file or one of: ${recipes[*]%.py}"
}

check_size() { # FLAG VALUE SIZE...: dies unless the value is one of the sizes; names the nearest
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

chips() { # SIZE: prints the number of chips of a size such as 4x8 or v6e-32
  local numbers="${1##*-}"
  echo $((${numbers//x/*}))
}

gpu_extras() { # prints the extras of setup.py that this training needs on GPUs
  case "${train[*]}" in
    *gs://*) echo cuda,gcs ;;
    *) echo cuda ;;
  esac
}

call() { # COMMAND ...: runs it, or in a dry run prints it with shell quotes
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
