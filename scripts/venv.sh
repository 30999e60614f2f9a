#!/bin/sh
# Installs the package into .venv and runs a command there:  scripts/venv.sh '.[test]' COMMAND ...
# Needs only Python 3.11 or newer. PYTHON=... replaces python3, VENV=... replaces .venv.
set -eu
cd "$(dirname "$0")/.."
what=$1
venv=${VENV:-.venv}
shift
if [ ! -x "$venv/bin/pip" ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than 3.11 or missing: set PYTHON=/path/to/python3.11" >&2
    exit 2
  }
  # Debian has venv in its own package.
  "$python" -c 'import ensurepip, venv' 2>/dev/null || {
    root=$([ "$(id -u)" = 0 ] || echo sudo)
    $root apt-get update -q && $root apt-get install -qy python3-venv
  }
  "$python" -m venv "$venv"
fi
# The same extras of the same pyproject.toml are installed already: no network is needed.
stamp=$venv/$(printf '%s\n' "$what" | cat - pyproject.toml | cksum | tr -c '0-9\n' _).installed
if [ ! -e "$stamp" ]; then
  "$venv/bin/pip" install -q --disable-pip-version-check -e "$what"
  touch "$stamp"
fi
PATH=$(cd "$venv/bin" && pwd):$PATH
export PATH
exec "$@"
