#!/usr/bin/env bash
# One run on all hosts of a TPU VM (one host or a slice of many), from your own machine, with gcloud:
#
#   launch/tpu_vm.sh keep [COMMAND...]    creates, starts, and repeats both after each preemption, until the run ends
#   launch/tpu_vm.sh create               creates the TPU VM, as a spot instance
#   launch/tpu_vm.sh start [COMMAND...]   copies this checkout to all hosts, installs it, starts the command on all
#   launch/tpu_vm.sh logs                 follows the first host's output
#   launch/tpu_vm.sh stop                 sends SIGTERM: the run saves and is not restarted; `start` resumes it
#   launch/tpu_vm.sh delete               deletes the TPU VM
#
# Fill in, here or in the environment: MY_TPU (a name), MY_ZONE, MY_BUCKET (for the work directory), TYPE and VERSION
# (gcloud compute tpus tpu-vm accelerator-types|versions list --zone=...). Set HF_TOKEN for a gated dataset.
#
# Each host restarts the command after 75 and 1, not after 0 and 2 (launch/restart.sh). `keep` exits with its last code.
set -eu

NAME=${NAME:-MY_TPU}
ZONE=${ZONE:-MY_ZONE}
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
WORKDIR=${WORKDIR:-gs://MY_BUCKET/runs/1b}
WATCH_SECONDS=${WATCH_SECONDS:-60}

usage() {
    sed -n '2,/^# Each host/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

tpu() {
    action=$1
    shift
    gcloud compute tpus tpu-vm "$action" "$NAME" --zone="$ZONE" "$@"
}

# Runs a command on hosts: `on all '...'`, `on 0 '...'`.
on() {
    tpu ssh --worker="$1" --command="$2"
}

# Prints the TPU VM's name, nothing if it does not exist, or `unknown` if the request fails.
found() {
    gcloud compute tpus tpu-vm list --zone="$ZONE" --filter="name~/$NAME\$" --format='value(name)' || echo unknown
}

create() {
    tpu create --accelerator-type="$TYPE" --version="$VERSION" --spot
}

running() {
    on all 'kill -0 $(cat jaxtrain.pid) 2> /dev/null' 2> /dev/null
}

# Each step has its own `|| return`, because `set -e` is off in a function called as a condition.
start() {
    if running; then
        echo 'launch/tpu_vm.sh: already running; `stop` saves and ends it' >&2
        return
    fi
    hosts=$(tpu describe --flatten='networkEndpoints[]' --format='value(networkEndpoints.ipAddress)') || return
    first=$(echo "$hosts" | head -n 1)
    count=$(echo "$hosts" | wc -l | tr -d ' ')

    archive=$(mktemp)
    tar -czf "$archive" --exclude=./.git --exclude=./.venv --exclude=./runs . || return
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:jaxtrain.tar.gz" --zone="$ZONE" --worker=all || return
    rm -f "$archive"

    # The image's own Python is older than 3.11.
    on all 'set -e
mkdir -p jaxtrain && tar -xzf jaxtrain.tar.gz -C jaxtrain && cd jaxtrain
python3 -m pip install -q --user uv
test -d .venv || python3 -m uv venv -q --python 3.12 .venv
python3 -m uv pip install -q --python .venv/bin/python -e ".[tpu,gcs]"' || return

    # jaxtrain reads these variables to join the processes. The metadata server knows each host's number.
    on all "set -e
if test -f jaxtrain.pid && kill -0 \$(cat jaxtrain.pid) 2> /dev/null; then
    exit 0
fi
rm -f jaxtrain.code
cd jaxtrain
export PATH=\$PWD/.venv/bin:\$PATH RESTART_RESULT=\$HOME/jaxtrain.code
export JAX_COORDINATOR_ADDRESS=$first:8476 JAX_NUM_PROCESSES=$count
export JAX_PROCESS_ID=\$(curl -sf -H 'Metadata-Flavor: Google' \
http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
${HF_TOKEN:+export HF_TOKEN=$(printf %q "${HF_TOKEN:-}")}
nohup launch/restart.sh $(printf '%q ' "$@")>> ../jaxtrain.log 2>&1 < /dev/null &
echo \$! > ../jaxtrain.pid"
}

# Exits when the run has ended on the first host. Retries whatever fails temporarily (a connection, capacity, a booting
# host).
keep() {
    started=''
    while :; do
        state=$(tpu describe --format='value(state)' || true)
        if [ "$state" = PREEMPTED ] || [ "$state" = TERMINATED ]; then
            started=''
            if tpu delete --quiet; then
                create || true
            fi
        elif [ "$state" = READY ] && [ -z "$started" ]; then
            if start "$@"; then
                started=1
            fi
        elif [ "$state" = READY ]; then
            code=$(on 0 'cat jaxtrain.code 2> /dev/null || true' || true)
            if [ -n "$code" ]; then
                exit "$code"
            fi
        elif [ -z "$state" ] && [ -z "$(found)" ]; then
            create || true
        fi
        sleep "$WATCH_SECONDS"
    done
}

case "$NAME $ZONE $WORKDIR" in
    *MY_*)
        echo "launch/tpu_vm.sh: fill in NAME, ZONE and WORKDIR: NAME=$NAME ZONE=$ZONE WORKDIR=$WORKDIR" >&2
        exit 2
        ;;
esac

task=${1:-}
if [ $# -gt 0 ]; then
    shift
fi
if [ $# -eq 0 ]; then
    set -- python -m jaxtrain.main --config=configs/1b.py --workdir="$WORKDIR"
fi
case "$task" in
    create) create ;;
    start) start "$@" ;;
    keep) keep "$@" ;;
    logs) on 0 'tail -n 100 -F jaxtrain.log' ;;
    stop) on all 'kill $(cat jaxtrain.pid)' ;;
    delete) tpu delete ;;
    *) usage ;;
esac
