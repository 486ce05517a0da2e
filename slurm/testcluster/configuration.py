"""The files that the daemons of a cluster read, and the cluster profile."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROFILE = """\
# A profile of the cluster that testcluster.py started here; gone when it stops.
# The GPUs are fake, hence device: cpu.
kind: slurm
partition: low
nodes: {shape}
procs_per_node: 2
gpus_per_node: {gpus}
cpus_per_proc: 1
time: 20m
signal_seconds: 30
peak_tflops: 0.05
runtime: {{device: cpu, workers: 0, threads: 1, grace_seconds: 30}}
environment: {{OMP_NUM_THREADS: 1}}
"""


def write_files(
    folder: Path, user: str, nodes: list[str], ports: dict[str, int], options: dict[str, Any]
) -> None:
    """Write slurm.conf, slurmdbd.conf, gres.conf, hosts and the profile into the cluster's folder.

    options: those of Cluster.
    """
    host = socket.gethostname().split(".")[0]
    node_ports = [str(ports[node]) for node in nodes]
    gpus, gpu_type = options["gpus"], options["gpu_type"]
    typed = f"{gpu_type}:{gpus}" if gpu_type else str(gpus)
    extra: list[str] = []
    if options["affinity"]:
        extra.append("TaskPluginParam=Cores")
    if options["preempt_user_signal"]:
        extra.append("SlurmctldParameters=preempt_send_user_signal")
    if options["accounting"]:
        extra.append("AccountingStorageType=accounting_storage/slurmdbd")
        extra.append("AccountingStorageHost=127.0.0.1")
        extra.append(f"AccountingStoragePort={ports['dbd']}")
        extra.append(f"AccountingStoragePass={folder}/run/munge.sock")
    if options["limits"]:
        extra.append("AccountingStorageEnforce=limits")
        if gpus:
            extra.append("AccountingStorageTRES=gres/gpu")
    if options["hide_jobs"]:
        extra.append("PrivateData=jobs")
    if gpus:
        extra.append("GresTypes=gpu")
        write_fake_gpus(folder, nodes, gpus, gpu_type)
    values = {
        **options,
        "message_timeout": options["kill_wait"] + 20,
        "name": cluster_name(folder),
        "dir": folder,
        "user": user,
        "ports": ports,
        "host": host,
        "nodes": ",".join(nodes),
        "requeue": int(options["requeue"]),
        "node_ports": ",".join(node_ports),
        "extra": "\n".join(extra),
        "gres": f"Gres=gpu:{typed}" if gpus else "",
        # Jobs can be suspended only where gang scheduling can resume them.
        "preempt_modes": "SUSPEND,GANG" if options["preempt_mode"] == "SUSPEND" else "REQUEUE",
        "task_plugin": "affinity" if options["affinity"] else "none",
    }
    (folder / "etc/slurmdbd.conf").touch(mode=0o600)
    for name in ("slurm.conf", "slurmdbd.conf"):
        template = (HERE / f"{name}.in").read_text()
        (folder / "etc" / name).write_text(template.format(**values))
    lines = [f"127.0.0.1 {name}\n" for name in ("localhost", host, *nodes)]
    (folder / "etc/hosts").write_text("".join(lines))
    profile = PROFILE.format(gpus=gpus, shape=min(2, len(nodes)))
    (folder / "testcluster.yaml").write_text(profile)


def cluster_name(folder: Path) -> str:
    return "".join(letter for letter in folder.name if letter.isalnum())


def write_fake_gpus(folder: Path, nodes: list[str], gpus: int, gpu_type: str) -> None:
    """Write gres.conf with a device file per GPU: without files slurmd refuses the node."""
    rows, kind = "", f"Type={gpu_type} " if gpu_type else ""
    for number in range(gpus):
        file = folder / f"dev/gpu{number}"
        file.unlink(missing_ok=True)
        file.symlink_to("/dev/null")
        for node in nodes:
            rows += f"NodeName={node} Name=gpu {kind}File={file}\n"
    (folder / "etc/gres.conf").write_text(rows)
