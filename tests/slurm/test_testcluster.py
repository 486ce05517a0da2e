"""The private Slurm behaves as the other tests assume."""

import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import testcluster
from processes import birth
from testcluster import Cluster

from jepa_cluster.launch.worker.requeue import REQUEUE

JOB = """#!/bin/bash
#SBATCH --open-mode=append --requeue
srun bash -c 'trap "echo USR2 >> output" USR2; trap "echo TERM >> output" TERM
echo "start $SLURMD_NODENAME ${SLURM_RESTART_COUNT:-0}" >> output
for i in $(seq 600); do sleep 0.1; done'
"""


def started(output: Path, restart: int, tasks: int) -> bool:
    """Whether this many tasks of the job have started after this many restarts."""
    return output.exists() and output.read_text().count(f" {restart}\n") == tasks


def test_nodes_have_their_own_names_and_gpus_and_listen_on_loopback_only(
    cluster: Cluster,
) -> None:
    """Host name, node name, address and granted GPUs, as seen by tasks on both nodes."""
    output = cluster.run(
        "srun",
        "-N2",
        "-n2",
        "--gpus-per-node=1",
        "bash",
        "-c",
        "echo $(hostname) $SLURMD_NODENAME $SLURM_LAUNCH_NODE_IPADDR ${CUDA_VISIBLE_DEVICES:-none}",
    )
    hosts = ["n1", "n2"]
    if not cluster.namespaces:
        hosts = [socket.gethostname()] * 2
    expected = {f"{hosts[0]} n1 127.0.0.1 0", f"{hosts[1]} n2 127.0.0.1 0"}
    assert set(output.splitlines()) == expected
    listening = cluster.run("ss", "-Hltn")
    for port in (cluster.ports["ctld"], cluster.ports["n1"], cluster.ports["n2"]):
        assert f"127.0.0.1:{port} " in listening
        assert f"0.0.0.0:{port} " not in listening


def test_signals_reach_the_tasks_and_a_requeued_job_starts_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    """USR2 by scancel, TERM by preemption; after scontrol requeue the job runs again."""
    output = tmp_path / "output"
    low = ("sbatch", "--parsable", "-N2", "-n2", "-c16", "-p", "low")
    job = cluster.run(*low, cwd=tmp_path, input=JOB).strip()
    cluster.until(lambda: started(output, 0, tasks=2), "both tasks run")
    cluster.run("scancel", "-s", "USR2", job)
    cluster.until(lambda: output.read_text().count("USR2") == 2, "both tasks saw USR2")
    high = ("sbatch", "--parsable", "-N2", "-c16", "-p", "high", "--wrap", "sleep 300")
    urgent = cluster.run(*high, cwd=tmp_path).strip()
    cluster.until(lambda: output.read_text().count("TERM") == 2, "both tasks saw TERM")
    cluster.run("scancel", urgent)
    cluster.run("scontrol", "requeue", job)
    cluster.until(lambda: started(output, 1, tasks=2), "both tasks run again")


def test_a_requeue_that_comes_after_scancel_starts_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The cancelled job still ends its tasks when one of them requests the requeue."""
    output = tmp_path / "output"
    script = JOB.replace('"echo TERM >> output" TERM', '"echo TERM >> output; sleep 2; exit" TERM')
    job = cluster.run("sbatch", "--parsable", cwd=tmp_path, input=script).strip()
    cluster.until(lambda: started(output, 0, tasks=1), "the task runs")
    cluster.run("scancel", job)
    cluster.until(lambda: "TERM" in output.read_text(), "the task saw TERM")
    cluster.run(*REQUEUE, job)
    cluster.until(lambda: job not in cluster.run("squeue", "-h", "-o", "%A"), "the job has ended")
    state = cluster.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")
    assert state.strip() == "CANCELLED"


def test_two_clusters_live_side_by_side_and_leave_nothing(cluster: Cluster) -> None:
    """The jobs, ports and folder of another cluster are separate; its stop removes them all."""
    with Cluster(nodes=1) as other:
        assert other.run("srun", "hostname")
        assert set(cluster.jobs()) != set(other.jobs())
        node = other.members("n1")
        folder = other.dir
    assert not folder.exists()
    assert not any(birth(pid) for pid in node)
    listening = cluster.run("ss", "-Hltn")
    for port in other.ports.values():
        assert f":{port} " not in listening


def test_another_process_finds_the_cluster_by_its_folder(cluster: Cluster) -> None:
    """As the command line of testcluster.py does."""
    found = Cluster.load(cluster.dir)
    assert found is not None
    assert found.options == cluster.options
    assert found.processes == cluster.processes
    assert "n1" in found.run("sinfo", "-N")


@pytest.mark.slow
def test_the_commands_start_and_stop_a_cluster(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name) / "c"

        def run(verb: str) -> str:
            command = [sys.executable, testcluster.__file__, verb, "--dir", str(folder)]
            return subprocess.run(
                [*command, "--nodes", "1"], check=True, text=True, stdout=subprocess.PIPE
            ).stdout

        try:
            assert f"SLURM_CONF={folder}/etc/slurm.conf" in run("start")
            daemons = json.loads((folder / "cluster.json").read_text())["processes"].values()
            assert "SLURM_CONF" in run("status")
        finally:
            run("stop")
        assert [pid for pid, born in daemons if birth(pid) == born] == []
        assert not folder.exists()
