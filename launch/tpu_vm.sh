#!/usr/bin/env bash
# A study on a slice of TPU VMs: ask for it, copy the checkout, run on every host, collect the report, delete the slice.
#
#   SHARE=10.0.0.2:/natfp launch/tpu_vm.sh STUDY [PATH=VALUE ...]
#
# Edit the lines below, or set them before the command. A slice of this NAME that is there already is used. One that is taken
# away is asked for again, and the study goes on from SHARE, a file system over NFS (such as Filestore) that outlives the slice:
# its hosts have no disk in common. Run this in tmux; KEEP=yes keeps the slice at the end.
set -euo pipefail

NAME=${NAME:-natfp}
ZONE=${ZONE:-us-west4-a}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
TERMS=${TERMS---spot} # or --reserved; empty: on demand
SHARE=${SHARE:?SHARE=HOST:/PATH is missing: where results are kept, over NFS}
RESTARTS=${RESTARTS:-100} PAUSE=${PAUSE:-30} # PAUSE: seconds between two questions to the queue

slice() { gcloud compute tpus queued-resources "$1" "$NAME" --zone "$ZONE" "${@:2}"; }
on() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker "$1" --command "$2"; }
state() { slice describe --format 'value(state.state)' 2>/dev/null || echo ABSENT; }

# shellcheck disable=SC2086 # TERMS are none or several
ready() { # a slice, with the checkout and what it needs, and SHARE at /mnt/natfp
    until now=$(state) && [ "$now" = ACTIVE ]; do
        case $now in
            ABSENT)
                slice create --node-id "$NAME" --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME" $TERMS || exit ;;
            SUSPENDED | FAILED) slice delete --force --quiet || true ;;
        esac
        sleep "$PAUSE"
    done
    git ls-files -z --cached --others --exclude-standard | tar --null --files-from - -czf "$packed" &&
        gcloud compute tpus tpu-vm scp "$packed" "$NAME":natfp.tgz --zone "$ZONE" --worker all &&
        on all "set -e; killall -q -w natfp || true; mkdir -p natfp; tar -xzf natfp.tgz -C natfp; cd natfp
            python3 -m pip install -q --user uv; [ -d .venv ] || python3 -m uv venv -q --python 3.12 .venv
            python3 -m uv pip install -q --python .venv -c constraints.txt -e '.[tpu]'
            command -v mount.nfs || { sudo apt-get -q update; sudo apt-get -qy install nfs-common; }
            sudo mkdir -p /mnt/natfp; mountpoint -q /mnt/natfp || sudo mount -t nfs $SHARE /mnt/natfp
            sudo chmod a+rwx /mnt/natfp"
}

packed=$(mktemp)
trap 'rm -f "$packed"' EXIT
printf -v command '%q ' .venv/bin/natfp run "$@" --out /mnt/natfp/out
for ((try = 0; try <= RESTARTS; try++)); do
    code=255
    if ready; then
        code=0
        on all "cd natfp && $command" || code=$?
    fi
    case $code in 75 | 134 | 255) echo "ended with $code: going on" >&2 ;; *) break ;; esac # 255: ssh has lost a host
done
if [ "$code" = 0 ]; then
    mkdir -p out && on 0 "cd /mnt/natfp/out && tar -cz studies/*/report" | tar -xz -C out
    [ -n "${KEEP:-}" ] || slice delete --force --quiet
fi
exit "$code"
