#!/bin/sh
# A Cloud TPU pod slice for one job: create it, copy the code, run on every worker, collect the small files, delete it.
#
#   NFS=10.0.0.2:/share sh launch/tpu_pod.sh all --config=experiments/ddpm.py:cifar10 --workdir=/mnt/share/runs/ddpm
#   sh launch/tpu_pod.sh --dry_run all --config=... --workdir=...     prints the commands, runs none
#   sh launch/tpu_pod.sh create | copy | run ARGUMENTS | collect ARGUMENTS | delete     one of the steps
#
# `all` deletes the slice however the job ends. `run` may be repeated: it goes on from the newest checkpoint.
# The workdir must be one folder for all workers: NFS=SERVER:/PATH is mounted on each as /mnt/share.
# Other variables: TPU_NAME (jaxgen), ZONE (us-west4-a), TPU_TYPE (v5litepod-16), TPU_VERSION
# (v2-alpha-tpuv5-lite), SPOT=1 for a preemptible slice. Needs gcloud, signed in and set to a project.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
name=${TPU_NAME:-jaxgen}
zone=${ZONE:-us-west4-a}
type=${TPU_TYPE:-v5litepod-16}
version=${TPU_VERSION:-v2-alpha-tpuv5-lite}

dry_run=
if [ "${1:-}" = --dry_run ]; then
    dry_run=1
    shift
fi

stop() {
    printf '%s\n' "$1" >&2
    exit 2
}

for word in "$@"; do
    case $word in
        --dry_run | --dry-run) stop "$word is not understood here: --dry_run goes first, before the step." ;;
    esac
done

quoted() { # the arguments as a shell would have to be given them
    line=
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
        esac
        line="$line${line:+ }$word"
    done
    printf '%s' "$line"
}

do_it() {
    if [ -n "$dry_run" ]; then
        quoted "$@"
        echo
    else
        "$@"
    fi
}

tpu() {
    do_it gcloud compute tpus tpu-vm "$@" --zone="$zone"
}

on_every_worker() {
    tpu ssh "$name" --worker=all --command="$1"
}

create() {
    if [ -n "${SPOT:-}" ]; then
        tpu create "$name" --accelerator-type="$type" --version="$version" --spot
    else
        tpu create "$name" --accelerator-type="$type" --version="$version"
    fi
}

copy() { # what git would commit, not .venv, runs and caches
    archive=${TMPDIR:-/tmp}/$name.tar.gz
    do_it sh -c 'cd "$1" && git ls-files -co --exclude-standard -z | tar czf "$2" --null -T -' copy "$root" "$archive"
    tpu scp "$archive" "$name:jaxgen.tar.gz" --worker=all
    # The images' own Python is older than 3.11.
    on_every_worker 'sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv nfs-common'
    on_every_worker 'mkdir -p jaxgen && tar xzf jaxgen.tar.gz -C jaxgen && cd jaxgen && root=$PWD && . launch/setup.sh && set_up tpu'
    if [ -n "${NFS:-}" ]; then
        on_every_worker "sudo mkdir -p /mnt/share && { mountpoint -q /mnt/share || sudo mount -t nfs $(quoted "$NFS") /mnt/share; }"
    fi
}

run() {
    on_every_worker "cd jaxgen && .venv/bin/python -m jaxgen.run --distributed $(quoted "$@")"
}

workdir_of() {
    for argument in "$@"; do
        case $argument in --workdir=*) printf '%s' "${argument#--workdir=}" ;; esac
    done
}

collect() { # all but the checkpoints, from where the first worker sees the workdir
    workdir=$(workdir_of "$@")
    [ -n "$workdir" ] || stop "Say what to collect: --workdir=DIRECTORY."
    kept="runs/$(basename -- "$workdir")"
    do_it mkdir -p "$root/$kept"
    tpu ssh "$name" --worker=0 --command="cd jaxgen && tar czf ~/run.tar.gz --exclude=checkpoints -C $(quoted "$workdir") ."
    tpu scp "$name:run.tar.gz" "$root/$kept/run.tar.gz" --worker=0
    do_it tar xzf "$root/$kept/run.tar.gz" -C "$root/$kept"
}

delete() {
    tpu delete "$name" --quiet
}

[ $# -gt 0 ] || stop "Say what to do: create, copy, run, collect, delete or all; --dry_run before it only prints."
action=$1
shift
[ -n "$dry_run" ] || command -v gcloud >/dev/null || stop "gcloud is not installed; --dry_run shows what would be run."
case $action in
    create | copy | delete) "$action" ;;
    run | collect)
        [ -n "$(workdir_of "$@")" ] || stop "Give the arguments of python -m jaxgen.run, --workdir=DIRECTORY among them."
        "$action" "$@"
        ;;
    all)
        [ -n "$(workdir_of "$@")" ] || stop "Give the arguments of python -m jaxgen.run, --workdir=DIRECTORY among them."
        # On a shell's exit, whatever the reason: a slice costs money as long as it is there.
        trap delete EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM
        create
        copy
        run "$@"
        collect "$@"
        ;;
    *) stop "$action is none of create, copy, run, collect, delete and all." ;;
esac
