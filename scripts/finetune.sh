#!/usr/bin/env bash
# Runs all downstream tasks on one pre-training, and prints one table at the end.
#   scripts/finetune.sh WORKDIR [VARIANT] [--config.FIELD=VALUE ...]     (VARIANT: demo, smoke, paper)
# The tasks write to WORKDIR-classify, WORKDIR-segment and WORKDIR-detect, and resume there.
set -euo pipefail
if [ $# -lt 1 ]; then sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2; fi
run=${1%/} variant=demo
shift
case "${1:-}" in [a-z]*) variant=$1; shift ;; esac
for task in classify segment detect; do
  echo "== $task" >&2
  python -m medsyn_jax.main --config "configs/$task.py:$variant" --workdir "$run-$task" \
    --config.encoder.workdir="$run" "$@"
done
python -m scripts.summary "$run"-{classify,segment,detect}
