#!/usr/bin/env bash
# usage: launch/restart.sh COMMAND...
#
# Restarts a command until it is done. By its exit code:
#   0, 2, 126, 127  stop: finished, a mistake to fix, no such command
#   75              stopped after saving: restart after the shortest pause
#   anything else   restart after pauses that double from RESTART_PAUSE to 300 seconds, until RESTART_LIMIT failures in
#                   a row. A run of RESTART_PROGRESS seconds or more resets the count.
# SIGTERM, SIGINT and SIGHUP are forwarded to the command, which is then not restarted. The exit code is the command's.
#
# Fill in, in the environment, only to change a default: RESTART_PAUSE (10 seconds), RESTART_LIMIT (10),
# RESTART_PROGRESS (600 seconds), RESTART_FINAL ("0 2 126 127": the codes that stop it), RESTART_RESULT (a file for the
# last code).
#
# example: launch/restart.sh python -m jaxtrain.main --config=configs/1b.py

# -m: the command gets its own process group, so that a terminal's Ctrl-C reaches it only once, through this script.
set -u -m

longest=300
pause=${RESTART_PAUSE:-10}
child='' signal='' again=''

finish() {
    if [ -n "${RESTART_RESULT:-}" ]; then
        echo "$1" > "$RESTART_RESULT"
    fi
    exit "$1"
}

pass_on() {
    signal=$1 again=1
    if [ -n "$child" ]; then
        kill -s "$signal" "$child" 2> /dev/null
    fi
}

# Sets `code`. The command runs in the background because only `wait` lets a trap run at once. A signal interrupts
# `wait`, so it is repeated until none did.
run() {
    "$@" &
    child=$!
    if [ -n "$signal" ]; then # it arrived before the process had an id
        kill -s "$signal" "$child" 2> /dev/null
    fi
    while :; do
        again=''
        wait "$child"
        code=$?
        if [ -z "$again" ]; then
            break
        fi
    done
    child=''
}

if [ $# -eq 0 ]; then
    sed -n '2,/^# example/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on HUP' HUP # has no effect under nohup

failures=0 wanted=$pause
while :; do
    SECONDS=0
    run "$@"
    if [ -n "$signal" ]; then
        finish "$code"
    fi
    for final in ${RESTART_FINAL:-0 2 126 127}; do
        if [ "$code" -eq "$final" ]; then
            finish "$code"
        fi
    done
    if [ "$code" -eq 75 ]; then
        wanted=$pause
    else
        if [ "$SECONDS" -ge "${RESTART_PROGRESS:-600}" ]; then
            failures=0
        fi
        if [ "$failures" -eq 0 ]; then
            wanted=$pause
        else
            wanted=$((wanted * 2 < longest ? wanted * 2 : longest))
        fi
        failures=$((failures + 1))
        if [ "$failures" -ge "${RESTART_LIMIT:-10}" ]; then
            echo "launch/restart.sh: giving up after $failures failures in a row, the last with exit code $code" >&2
            finish "$code"
        fi
    fi
    echo "launch/restart.sh: exit code $code, running again in $wanted s" >&2
    run sleep "$wanted"
    if [ -n "$signal" ]; then
        finish 75
    fi
done
