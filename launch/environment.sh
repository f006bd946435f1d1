# shellcheck shell=bash
# Sourced by the other scripts in this folder: `use_environment WHAT [FOLDER]` creates a virtual
# environment in FOLDER (.venv by default), installs WHAT in it (. or .[extra]) and puts it first in
# PATH. It installs again only if setup.py has changed.

find_python() {
  local python
  for python in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  echo "error: sop_jax needs Python 3.11 or later, and there is none in PATH. Install it from" >&2
  echo "https://www.python.org/downloads or with your system's package manager." >&2
  return 1
}

use_environment() {
  local python folder="${2:-.venv}" stamp
  stamp="$folder/installed-${1//[^a-z]/}"
  if [[ ! -x "$folder/bin/python" ]]; then
    python="$(find_python)"
    echo "Creating a virtual environment in $folder with $("$python" --version)."
    if ! "$python" -m venv "$folder"; then
      rm -rf "$folder"
      echo "error: $python cannot create virtual environments. Install python3-venv on Debian" >&2
      echo "and Ubuntu, or a complete Python on other systems." >&2
      return 1
    fi
  fi
  PATH="$PWD/$folder/bin:$PATH"
  if ! cmp -s setup.py "$stamp"; then
    echo "Installing sop_jax and its dependencies: about 1 GB, a few minutes."
    # Debian's pip prints a notice of a package without --use-pep517, which is the default later.
    python -m pip install --quiet --disable-pip-version-check --use-pep517 -e "$1"
    cp setup.py "$stamp"
  fi
}
