#!/bin/sh
# Starts one run on all hosts of a TPU VM pod, and follows the log of the first host.
#
#   tpu/run_on_pod.sh NAME ZONE WORKDIR --config configs/convirt.py:paper [--config.FIELD=...]
#
# Needs gcloud; a repository with the current commit that the hosts can reach (REPO, default: the
# remote `origin`); and Python 3.11 or newer on the hosts (PYTHON=/path/to/python, default: python3).
# WORKDIR, like every data folder in the config, is a path that all hosts see (Filestore, or a
# bucket mounted by gcsfuse). After a preemption the same command resumes the run. Stop with
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all --command='pkill -TERM -f medsyn_jax.main'
set -eu
if [ $# -lt 4 ]; then
  sed -n '2,10p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 workdir=$3
shift 3
repo=${REPO:-$(git remote get-url origin)}
commit=$(git rev-parse HEAD)
flags=
for flag in "$@"; do
  flags="$flags '$(printf %s "$flag" | sed "s/'/'\\\\''/g")'"
done
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command="
  set -e
  [ -d medsyn_jax_repo ] || git clone -q '$repo' medsyn_jax_repo
  cd medsyn_jax_repo
  git fetch -q && git checkout -q '$commit'
  export MEDSYN_DISTRIBUTED=1
  PYTHON='${PYTHON:-python3}' scripts/venv.sh '.[tpu]' python -m medsyn_jax.main --workdir '$workdir' $flags
"
