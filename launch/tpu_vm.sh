#!/usr/bin/env bash
# A study on a slice of TPU VMs: ask for it, copy the checkout, run on every host, collect the report, delete the slice.
#
#   SHARE=10.0.0.2:/natfp launch/tpu_vm.sh STUDY [PATH=VALUE ...]     # over NFS, such as Filestore
#   SHARE=gs://bucket/folder launch/tpu_vm.sh STUDY [PATH=VALUE ...]  # with a service account that may write there
#
# Edit the lines below, or set them before the command. A queued resource of this NAME that is there already is used. A slice that
# is taken away is asked for again, and the study goes on from SHARE, which outlives it. Run this in tmux: Ctrl-C leaves the
# slice, at your expense, as a failure does that does not pass, or KEEP=yes; what deletes it is printed then.
set -euo pipefail

NAME=${NAME:-natfp} ZONE=${ZONE:-us-west4-a}
ACCELERATOR=${ACCELERATOR:-v5litepod-16} RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
TERMS=${TERMS---spot} # or --reserved; empty: on demand
SHARE=${SHARE:?SHARE=HOST:/PATH or gs://BUCKET/FOLDER is missing: where results are kept}
RESTARTS=${RESTARTS:-100} PAUSE=${PAUSE:-30} # PAUSE: seconds between two tries, and two questions to the queue
slice() { gcloud compute tpus queued-resources "$1" "$NAME" --zone "$ZONE" "${@:2}"; }
on() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker "$1" --command "$2"; }
state() { slice describe --format 'value(state.state)' 2>"$said" || { grep -q NOT_FOUND "$said" && echo ABSENT; } || cat "$said" >&2; }
left() { [ "$(state)" = ABSENT ] || echo "$NAME is left: gcloud compute tpus queued-resources delete $NAME --zone $ZONE --force" >&2; }
packed=$(mktemp) said=$(mktemp)
trap 'left; rm -f "$packed" "$said"' EXIT

case $SHARE in
    gs://*) out=$SHARE/out mount=true ;;
    *) out=/mnt/natfp/out mount="command -v mount.nfs || { sudo apt-get -q update; sudo apt-get -qy install nfs-common; }
        sudo mkdir -p /mnt/natfp; mountpoint -q /mnt/natfp || sudo mount -t nfs $SHARE /mnt/natfp; sudo chmod a+rwx /mnt/natfp" ;;
esac
# shellcheck disable=SC2086 # TERMS are none or several
ready() { # a slice, with the checkout and what it needs
    until now=$(state) && [ "$now" = ACTIVE ]; do
        case $now in
            ABSENT) slice create --node-id "$NAME" --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME" $TERMS || exit ;;
            SUSPENDED | FAILED) slice delete --force --quiet || true ;;
        esac
        sleep "$PAUSE"
    done
    git ls-files -z --cached --others --exclude-standard | tar --null --files-from - -czf "$packed" || exit
    gcloud compute tpus tpu-vm scp "$packed" "$NAME":natfp.tgz --zone "$ZONE" --worker all || return
    on all "set -e; mkdir -p natfp; tar -xzf natfp.tgz -C natfp; cd natfp
        python3 -m pip install -q --user uv; [ -d .venv ] || python3 -m uv venv -q --python 3.12 .venv
        python3 -m uv pip install -q --python .venv -c constraints.txt -e '.[tpu,gcs]'; $mount"
}
printf -v command '%q ' .venv/bin/natfp run "$@" --out "$out"
for ((try = 0; try <= RESTARTS; try++)); do
    code=0
    # gcloud starts this again where ssh has lost a host: what is at work there still saves and ends first.
    ready && on all "killall -q -w natfp; cd natfp && $command" || code=$?
    case $code in
        0) break ;;
        75 | 134 | 255) ;; # stopped, or ssh has lost a host
        *) [ "$(state)" != ACTIVE ] || exit "$code" ;; # else the slice was taken away
    esac
    echo "ended with $code: going on" >&2
    sleep "$PAUSE"
done
[ "$code" = 0 ] || exit "$code"
mkdir -p out/studies
case $SHARE in gs://*) gcloud storage rsync --recursive --exclude ".*/(draws|tasks)/.*" "$out/studies" out/studies ;; *) on 0 "cd $out && tar -cz studies/*/report" | tar -xz -C out ;; esac
[ -n "${KEEP:-}" ] || slice delete --force --quiet
