#!/bin/bash
# Trains on two machines with eight GPUs each, until the training is done:
#     sbatch docs/slurm_train.sh --train_data_dir outputs/imagenet64 --output_dir outputs/res_res ...
# Submit from the root of the repository, with its environment active. Five minutes before its time limit the job is sent
# SIGTERM; the run saves a checkpoint, and the job queues itself again.
#SBATCH --job-name=imagenet64
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -uo pipefail

GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MAIN_PORT=$((10000 + SLURM_JOB_ID % 50000))
export GPUS_PER_NODE MAIN_ADDRESS MAIN_PORT

stopped=0
trap 'stopped=1; kill -TERM "$step"' TERM

# One launcher on each machine, which learns its number there. exec, so that the signal reaches it.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --multi_gpu \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS_PER_NODE))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" \
    --rdzv_backend static --mixed_precision "${MIXED_PRECISION:-bf16}" --dynamo_backend no \
    train_imagenet64.py "$@"' train "$@" &
step=$!

# A signal ends wait before the step has ended, so wait until it is gone.
while true; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break
done

if [ "$stopped" = 1 ]; then
    echo "stopped before the end: the job queues again and resumes from its checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
