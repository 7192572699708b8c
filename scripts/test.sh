#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets itself up, then runs the tests; arguments go to pytest (paths are relative to the project).
#   bash scripts/test.sh                  everything quick
#   bash scripts/test.sh tests/config -x  some of it
#   bash scripts/test.sh -m slow          the slow ones
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${JAXRLHF_VENV:-$root/.venv}"
bash "$root/scripts/setup.sh"
cd "$root"
export PATH="$venv/bin:$PATH"
# malloc on huge pages: a sixth off every CPU step; read only when a process starts
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec "$venv/bin/python" -m pytest -n "${JAXRLHF_WORKERS:-2}" --dist loadfile "$@"
