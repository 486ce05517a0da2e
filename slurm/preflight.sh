#!/usr/bin/env bash
# Is a node fit for a trial? Run it on the nodes that a sweep will use, one task a node:
#
#   srun -N4 --ntasks-per-node=1 --gpus-per-node=8 slurm/preflight.sh /shared/jepa-root /shared/clone/.venv/bin/python
#
# First argument: the root folder of all trials. Second: the Python that trials use (default: python3). One line a
# finding: "ok", "warn" (works, with a loss that is told) or "FAIL"; the exit status is the number of FAILs. It
# changes nothing but for one probe file in the root, which it removes.
set -uo pipefail
root=${1:?usage: preflight.sh ROOT [PYTHON]}
python=${2:-python3}
node=${SLURMD_NODENAME:-$(hostname)}
fails=0
say() { printf '%-5s %-10s %s\n' "$1" "$node" "$2"; [ "$1" != FAIL ] || fails=$((fails + 1)); }

# The root is shared and writable: metrics, checkpoints and logs go there.
probe="$root/.preflight.$node.$$"
if mkdir -p "$root" 2>/dev/null && date +%s >"$probe" 2>/dev/null; then
  stamp=$(stat -c %Y "$probe"); skew=$(($(date +%s) - stamp)); rm -f "$probe"
  say ok "root $root is writable on $(stat -f -c %T "$root")"
  if ((skew > 5 || skew < -5)); then say warn "the clock differs from the filesystem's by $skew s: let NTP mend it"; fi
  free=$(df -P -BG "$root" | awk 'NR == 2 { sub("G", "", $4); print $4 }')
  if ((free < 50)); then say warn "$free GB are free below $root; a checkpoint of ViT-H takes 13 GB"; fi
else
  say FAIL "root $root cannot be written from here: is it on the shared filesystem?"
fi

# Python, and the packages of the training side.
if found=$("$python" -c 'import sys, torch, timm; print(sys.version.split()[0], torch.__version__, timm.__version__)' 2>&1); then
  say ok "python, torch, timm: $found"
else
  say FAIL "$python cannot import torch and timm: ${found##*$'\n'}"
fi

# GPUs: those that Slurm granted are those that torch sees.
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  granted=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
  seen=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0)
  if [ "$seen" = "$granted" ]; then say ok "$seen GPUs"; else say FAIL "Slurm granted $granted GPUs, torch sees $seen"; fi
else
  say warn "no GPU granted (CUDA_VISIBLE_DEVICES is empty): trials would run on CPU"
fi

# What a requeue needs. Without scontrol here, a preempted trial gets a successor job instead.
if command -v scontrol >/dev/null; then
  config=$(timeout 20 scontrol show config 2>/dev/null)
  if [ -n "$config" ]; then
    value() { awk -v key="$1" '$1 == key { print $3 }' <<<"$config"; }
    say ok "slurmctld answers; MaxArraySize $(value MaxArraySize), KillWait $(value KillWait) s"
    [ "$(value JobRequeue)" = 1 ] || say warn "JobRequeue=0: jobs ask for it themselves, some sites refuse that"
  else
    say warn "scontrol is here but slurmctld did not answer within 20 s"
  fi
else
  say warn "no scontrol on this node: requeue will use a successor job"
fi

# A name for the other ranks to connect to.
if getent hosts "$(hostname)" >/dev/null; then say ok "the host name resolves"; else say warn "$(hostname) does not resolve here"; fi
exit "$fails"
