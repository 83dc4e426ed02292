#!/usr/bin/env bash
# Runs a suite on the nodes of a Slurm job: Ray's head on the first, a Ray node on each other, then
# the run, on the first. From the repository's folder, on a file system that all nodes see:
#
#   sbatch docs/cluster/slurm.sh run suites/paper_table.yaml --profile cifar10 --store STORE
#
# STORE is a folder that all nodes see, or s3://BUCKET/PREFIX. The environment is .venv, or the one
# that MAECT_ENV names.
#SBATCH --job-name=maect-bench
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=24:00:00
# two minutes before the time is over the run ends in order, and the job queues again
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# the run outlives the loss of a node that is not its own
#SBATCH --no-kill
set -euo pipefail
source "${MAECT_ENV:-.venv}/bin/activate"

# Ray's token: who has none gets no answer. It is in the environment of this job's processes only
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | cut -d' ' -f1)
port=$((20000 + SLURM_JOB_ID % 10000)) # those from 10002 on are Ray's workers'
has=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --block)

# in a folder of its own: /tmp/ray may be another user's
srun --nodes=1 --ntasks=1 --nodelist="$first" ray start --head --node-ip-address="$ip" \
  --port="$port" --temp-dir="/tmp/ray-$SLURM_JOB_ID" "${has[@]}" &
for ((second = 0; ; second++)); do
  (: < "/dev/tcp/$ip/$port") 2> /dev/null && break
  [ "$second" -lt 120 ] || { echo "Ray's head does not answer at $ip:$port" >&2; exit 1; }
  sleep 1
done
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
  srun --nodes="$others" --ntasks="$others" --exclude="$first" --kill-on-bad-exit=0 --no-kill \
    ray start --address="$ip:$port" "${has[@]}" &
fi
# so that the first stages find all devices
python - "$ip:$port" "$SLURM_JOB_NUM_NODES" << 'PYTHON'
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False)
end = time.monotonic() + 120
while (alive := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]):
    if time.monotonic() > end:
        print(f"{alive} of {sys.argv[2]} nodes have joined; the run goes on with these")
        break
    time.sleep(1)
PYTHON

again='' run=''
trap 'again=yes; [ -z "$run" ] || kill -TERM "$run"' USR1
python -u -m bench "$@" --address "$ip:$port" &
run=$!
[ -z "$again" ] || kill -TERM "$run"
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do # the signal ended the wait; the run ends a little later
  code=0
  wait "$run" || code=$?
done
if [ -n "$again" ] && [ "$code" != 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
