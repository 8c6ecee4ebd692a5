#!/bin/bash
# sbatch configs/slurm.sh --model resnet50 --data-dir /data/imagenet --output runs/resnet50
#
# Several nodes. Before its time is over the job saves a checkpoint and puts itself back into the queue; one that is
# preempted saves a checkpoint too, and Slurm puts it back. It goes on from the newest checkpoint. The run directory must
# be on a file system that all nodes see.
#SBATCH --job-name=self-distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

# Two minutes before the end Slurm sends SIGUSR1 to this script, which hands it on: each training process saves a
# checkpoint and ends. torchrun itself must not be hit by it.
put_back() {
    scancel --signal=USR1 "$SLURM_JOB_ID.0"
    sleep 60
    scontrol requeue "$SLURM_JOB_ID"
}
trap put_back USR1

# Without it a machine that comes back could not join those that stayed.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # which srun no longer takes from the job by itself
srun bash -c 'trap "" USR1; exec torchrun "$@"' torchrun \
    --nnodes "$SLURM_NNODES" --nproc_per_node 8 --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    examples/train.py --resume auto -j 8 --amp --amp-dtype bfloat16 --checkpoint-interval 10m "$@" &
wait $!
