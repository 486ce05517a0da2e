#!/bin/bash

# Parameters
#SBATCH --array=0-2%2
#SBATCH --chdir=$TMP/root/code/code
#SBATCH --cpus-per-task=12
#SBATCH --error=$TMP/root/sweeps/sweep/jobs/%j.log
#SBATCH --gpus-per-node=8
#SBATCH --job-name=jepa.sweep.b.0
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=$TMP/root/sweeps/sweep/jobs/%j.log
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
mkdir -p $TMP/root/sweeps/sweep/jobs/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
export OMP_NUM_THREADS=8
export NCCL_DEBUG=WARN
export PYTHONPATH=$TMP/root/code/code
export JEPA_KILL_WAIT=30

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output $TMP/root/sweeps/sweep/jobs/%A_%a/%A_%a_%t_log.out --error $TMP/root/sweeps/sweep/jobs/%A_%a/%A_%a_%t_log.err --kill-on-bad-exit=1 --wait=300 env --block-signal=USR2,TERM PYTHON -u -m submitit.core._submit $TMP/root/sweeps/sweep/jobs/%j
