"""The private Slurm itself does what the other tests lean on."""

import socket
from pathlib import Path

from processes import birth
from testcluster import Cluster

TELL = """#!/bin/bash
#SBATCH --open-mode=append --requeue
srun bash -c 'trap "echo USR2 >> told" USR2; trap "echo TERM >> told" TERM
echo "start $SLURMD_NODENAME ${SLURM_RESTART_COUNT:-0}" >> told
for i in $(seq 600); do sleep 0.1; done'
"""


def started(told: Path, restart: int, tasks: int) -> bool:
    return told.exists() and sum(line.endswith(f" {restart}") for line in told.read_text().splitlines()) == tasks


def test_nodes_have_names_and_gpus_of_their_own_and_listen_on_loopback_only(cluster: Cluster) -> None:
    """Host name, node name, address and granted GPUs, as seen by tasks on both nodes."""
    told = cluster.run(
        "srun", "-N2", "-n2", "--gpus-per-node=1", "bash", "-c",
        "echo $(hostname) $SLURMD_NODENAME $SLURM_LAUNCH_NODE_IPADDR ${CUDA_VISIBLE_DEVICES:-none}",
    )  # fmt: skip
    expected = {f"{n if cluster.namespaces else socket.gethostname()} {n} 127.0.0.1 0" for n in ("n1", "n2")}
    assert set(told.splitlines()) == expected
    listening = cluster.run("ss", "-Hltn")
    for port in (cluster.ports["ctld"], cluster.ports["n1"], cluster.ports["n2"]):
        assert f"127.0.0.1:{port} " in listening
        assert f"0.0.0.0:{port} " not in listening


def test_signals_reach_the_tasks_and_a_requeued_job_starts_again(cluster: Cluster, tmp_path: Path) -> None:
    """USR2 by scancel, TERM by a job in `high` that wants the nodes; after scontrol requeue it runs once more."""
    told = tmp_path / "told"
    job = cluster.run("sbatch", "--parsable", "-N2", "-n2", "-c16", "-p", "low", cwd=tmp_path, input=TELL).strip()
    cluster.until(lambda: started(told, 0, tasks=2), "both tasks run")
    cluster.run("scancel", "-s", "USR2", job)
    cluster.until(lambda: told.read_text().count("USR2") == 2, "both tasks saw USR2")
    urgent = cluster.run("sbatch", "--parsable", "-N2", "-c16", "-p", "high", "--wrap", "sleep 300", cwd=tmp_path)
    cluster.until(lambda: told.read_text().count("TERM") == 2, "both tasks saw TERM")
    cluster.run("scancel", urgent.strip())
    cluster.run("scontrol", "requeue", job)
    cluster.until(lambda: started(told, 1, tasks=2), "both tasks run again")


def test_two_clusters_live_side_by_side_and_leave_nothing(cluster: Cluster) -> None:
    """Another cluster's jobs, ports and folder are its own, and stop removes them all."""
    with Cluster(nodes=1) as other:
        assert other.run("srun", "hostname") and set(cluster.jobs()) != set(other.jobs())
        node, folder = other.members("n1"), other.dir
    assert not folder.exists()
    assert not any(birth(pid) for pid in node)
    listening = cluster.run("ss", "-Hltn")
    assert not any(f":{port} " in listening for port in other.ports.values())
