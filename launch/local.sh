#!/bin/sh
# The main job on this machine, set-up included: a DDPM on real digits, or whatever the arguments say.
#
#   sh launch/local.sh                                   trains, evaluates, samples, writes runs/ddpm_digits/report.html
#   sh launch/local.sh --config.train.num_steps=100      the same job with another setting
#   sh launch/local.sh --config=... --workdir=...        another job: the arguments of python -m jaxgen.run
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/launch/setup.sh"
if has_nvidia_gpu; then set_up cuda; else set_up; fi

cd "$root"
for argument in "$@"; do
    case $argument in
        --config | --config=* | -config | -config=*) exec "$python" -m jaxgen.run "$@" ;;
    esac
done
exec "$python" -m jaxgen.run --config=experiments/ddpm.py:digits --workdir=runs/ddpm_digits "$@"
