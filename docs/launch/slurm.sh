#!/bin/bash
# Headrace on several machines under Slurm. Edit the lines marked <-, then: sbatch slurm.sh
# One torchrun a machine, which starts PER_NODE stages there, and starts them again when one fails.
# With checkpoint.every in the configuration (docs/checkpoints.md) they go on where they were.

#SBATCH --job-name=headrace
#SBATCH --nodes=2                    # <- machines
#SBATCH --ntasks-per-node=1          # one torchrun each
#SBATCH --cpus-per-task=16           # <-
#SBATCH --gpus-per-node=2            # <- leave out on CPUs
#SBATCH --time=24:00:00              # <-
#SBATCH --signal=TERM@60             # to the stages, a minute or two before the time is over
#SBATCH --requeue                    # start again after a pre-emption or a machine's failure
#SBATCH --open-mode=append           # in the same log
#SBATCH --output=%x-%j.log

set -euo pipefail

export CONFIG=train.yaml             # <- on a disk that all machines see
export PER_NODE=2                    # <- stages on each machine
export GLOO_SOCKET_IFNAME=eth0       # <- the interface between the machines: ip -brief address
export NCCL_SOCKET_IFNAME=eth0       # <- the same, for GPUs
export OMP_NUM_THREADS=1

export STAGES=$((SLURM_JOB_NUM_NODES * PER_NODE))
export FIRST PORT=$((20000 + SLURM_JOB_ID % 10000))
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)

train() {
    srun bash -c 'exec torchrun \
        --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$PER_NODE" \
        --master-addr "$FIRST" --master-port "$PORT" --max-restarts 3 \
        -m headrace.launch.train --config "$CONFIG" --stages "$STAGES" \
        --checkpoint.resume auto'
}

# What another start may mend (a machine, a cable, the end of the time) goes back into the queue.
if ! train; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then    # <- so often
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 1
fi
