#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole loop on the embedded world: sets itself up, then base model -> SFT -> reward model ->
# PPO and DPO -> evaluation -> report. Run it from any folder; a second call finds its work done.
#   bash scripts/quickstart.sh [--output DIR] [seed=1] [NAME.key=value ...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${JAXRLHF_VENV:-$root/.venv}"
bash "$root/scripts/setup.sh"
exec "$venv/bin/python" -m jaxrlhf run "$root/configs/pipelines/quickstart.yaml" \
  --output "$root/runs/quickstart" "$@"
