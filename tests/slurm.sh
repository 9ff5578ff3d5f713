#!/bin/bash
# Starts SLURM on this machine alone, in a folder, submits launch/slurm.sbatch with two tasks, and waits for the job.
#
#   tests/slurm.sh FOLDER ARGUMENTS-OF-JAXGEN...     as root; needs the packages slurm-wlm and munge
#
# The job's log is FOLDER/job.log. Status 77 where SLURM cannot start here; else 0 if the job completed, 1 if not.
# Everything it starts ends with it; nothing is written outside FOLDER but munge's socket, in a folder beside it.
set -uo pipefail
folder=$1
shift
cannot() {
    echo "SLURM cannot start here: $1"
    exit 77
}
[[ $(id -u) == 0 ]] || cannot "not root"
for tool in munged mungekey slurmctld slurmd sbatch scontrol sinfo; do
    PATH=$PATH:/usr/sbin command -v "$tool" >/dev/null || cannot "no $tool (packages slurm-wlm and munge)"
done
id munge >/dev/null 2>&1 || cannot "no user munge"
PATH=$PATH:/usr/sbin

started=()
sockets=$(mktemp -d)
finish() {
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null; done
    sleep 1
    for pid in "${started[@]}"; do kill -9 "$pid" 2>/dev/null; done
    rm -rf "$sockets"
}
trap finish EXIT

# munged insists on its own user, and on folders that nobody else may write to.
mkdir -p "$folder"/{state,spool}
chmod 755 "$sockets"
mkdir "$sockets/munge"
mungekey --create --keyfile="$sockets/munge/key" || cannot "no munge key"
chown -R munge: "$sockets/munge"
chmod 755 "$sockets/munge"
chmod 600 "$sockets/munge/key"
setpriv --reuid=munge --regid=munge --clear-groups munged --foreground --num-threads=2 \
    --key-file="$sockets/munge/key" --socket="$sockets/munge/socket" --pid-file="$sockets/munge/pid" \
    --log-file="$sockets/munge/log" --seed-file="$sockets/munge/seed" >"$folder/munged.log" 2>&1 &
started+=($!)

host=$(hostname -s)
port=$((20000 + RANDOM % 10000))
cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
AuthInfo=socket=$sockets/munge/socket
CryptoType=crypto/munge
SlurmUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=300
SlurmdTimeout=300
JobRequeue=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf

wait_for() { # SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.5
    done
}
wait_for 30 test -S "$sockets/munge/socket" || cannot "munged: $(tail -1 "$folder/munged.log")"
slurmctld -D -c >"$folder/slurmctld.log" 2>&1 &
started+=($!)
slurmd -D -N "$host" >"$folder/slurmd.log" 2>&1 &
started+=($!)
is_idle() { sinfo --noheader --format=%t 2>/dev/null | grep -q '^idle'; }
wait_for 60 is_idle || cannot "$(tail -2 "$folder/slurmctld.log" "$folder/slurmd.log")"

job=$(sbatch --parsable --nodes=1 --ntasks-per-node=2 --cpus-per-task=1 --overcommit --time=30 --output="$folder/job.log" \
    launch/slurm.sbatch "$@") || exit 1
echo "job $job"
state() { scontrol show job "$job" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }
is_over() { [[ $(state) =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)$ ]]; }
wait_for "${JAXGEN_SLURM_SECONDS:-900}" is_over
echo "state $(state)"
[[ $(state) == COMPLETED ]]
