#!/usr/bin/env sh
# Runs N processes of one command on this machine, as one JAX run (see local.py):
#   launch/local.sh 2 python -m jaxtrain.main --config=configs/quickstart.py
exec python3 "$(dirname "$0")/local.py" "$@"
