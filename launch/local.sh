#!/usr/bin/env bash
# A study by several processes on one machine, such as one for each GPU.
#
#   launch/local.sh PROCESSES STUDY --out OUT [PATH=VALUE ...]
#
# Each process sees one GPU, or, where there is none, one device of the CPU. Ctrl-C or SIGTERM has all of them save and stop;
# what stops otherwise for a reason that may pass is started again.
set -uo pipefail

NATFP=${NATFP:-.venv/bin/natfp}
RESTARTS=${RESTARTS:-20}
PORT=${PORT:-$((20000 + RANDOM % 10000))} # at which the processes meet

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
    echo "usage: launch/local.sh PROCESSES STUDY [options of natfp run]" >&2
    exit 2
fi
processes=$1
shift

IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}" # of a part of a machine
stopped='' told=''
trap 'stopped=yes told=yes; kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

for ((try = 0; try <= RESTARTS; try++)); do
    pids=()
    for ((i = 0; i < processes; i++)); do
        CUDA_VISIBLE_DEVICES=${gpus[i]:-$i} "$NATFP" run "$@" --coordinator "localhost:$PORT" --processes "$processes" --process "$i" &
        pids+=($!)
    done
    [ -z "$stopped" ] || kill -TERM "${pids[@]}" 2>/dev/null # those that were started after the signal
    worst=0
    for pid in "${pids[@]}"; do
        told=yes
        while [ -n "$told" ]; do # a signal ends a wait, not what is waited for
            told='' code=0
            wait "$pid" || code=$?
        done
        [ "$code" -gt "$worst" ] && worst=$code
    done
    [ "$worst" = 75 ] || [ "$worst" = 134 ] || break
    [ -z "$stopped" ] || break
    echo "natfp ended with $worst: going on" >&2
done
exit "$worst"
