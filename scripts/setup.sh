#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the virtual environment that the other scripts use: .venv with what requirements.lock says.
# A second call finds it finished and does nothing. Needs only Python >= 3.11 with pip.
#   PYTHON=python3.12 bash scripts/setup.sh     a Python of your choice
#   JAXRLHF_VENV=DIR  bash scripts/setup.sh     another place for the environment
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${JAXRLHF_VENV:-$root/.venv}"

fits() { # a Python that runs, is new enough and can make environments
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" || { echo "setup: $PYTHON is no Python >= 3.11 with venv and pip" >&2; return 1; }
    echo "$PYTHON"
    return
  fi
  for name in python3.12 python3.11 python3.13 python3.14 python3 python; do
    if fits "$name"; then
      echo "$name"
      return
    fi
  done
  echo "setup: no Python >= 3.11 with venv and pip was found; install one, or say PYTHON=PATH" >&2
  return 1
}

stamp_of() { # what the environment is made from
  "$1" - "$root" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
data = b"".join((root / name).read_bytes() for name in ("requirements.lock", "pyproject.toml"))
print(hashlib.sha256(data + str(root).encode()).hexdigest())
PY
}

if [ -x "$venv/bin/python" ] && [ -f "$venv/jaxrlhf.stamp" ] &&
  [ "$(cat "$venv/jaxrlhf.stamp")" = "$(stamp_of "$venv/bin/python")" ]; then
  exit 0
fi

if ! [ -x "$venv/bin/python" ]; then
  python="$(find_python)"
  echo "setup: creating $venv with $("$python" --version 2>&1)"
  "$python" -m venv "$venv"
fi
echo "setup: installing the packages of requirements.lock (minutes, once)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.lock"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e "$root"
stamp_of "$venv/bin/python" >"$venv/jaxrlhf.stamp"
echo "setup: done"
