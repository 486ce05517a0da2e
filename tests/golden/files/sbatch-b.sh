#!/bin/bash

# Parameters
#SBATCH --array=0-2%2
#SBATCH --chdir=$TMP/root/code/code
#SBATCH --cpus-per-task=12
#SBATCH --error=$TMP/root/sweeps/sweep/jobs/%A_%a.log
#SBATCH --gpus-per-node=8
#SBATCH --job-name=jepa.sweep.b.0
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=$TMP/root/sweeps/sweep/jobs/%A_%a.log
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
block=(env --block-signal=USR2,TERM)
"${block[@]}" true 2>/dev/null || block=(bash -c 'trap "" USR2 TERM; exec "$@"' bash PYTHON -ISc
'import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM])
os.execvp(sys.argv[1], sys.argv[1:])')

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output $TMP/root/sweeps/sweep/jobs/%A_%a/%A_%a_%t_log.out --error $TMP/root/sweeps/sweep/jobs/%A_%a/%A_%a_%t_log.err --kill-on-bad-exit=1 --wait=300 --cpus-per-task=12 "${block[@]}" PYTHON -u -m jepa_cluster.launch.worker.main $TMP/root/sweeps/sweep/intents/jepa.sweep.b.0.json
