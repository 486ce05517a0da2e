#!/usr/bin/env python3
"""A private, temporary, real Slurm: several nodes on this one machine, for tests and trials.

In: how many nodes, CPUs and (fake) GPUs. Out: running daemons on loopback ports, a `slurm.conf` to
export and a cluster profile. As a script: `testcluster.py start | stop | status`. As a module:
`with Cluster(nodes=2) as c:`.

Standard library only; it knows nothing of jepa_cluster. It needs Slurm's own programs; `missing()`
returns the command that installs them. It works as root and as an ordinary user. Where the kernel
allows it, every node is a namespace of its own with its own host name, so that a power cut ends all
of its processes. `stop` removes all that it leaves: one folder in /tmp.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from configuration import write_files
from daemons import Daemons
from machine import ClusterError, claim_ports, find_program, has_namespaces, missing, unshare
from processes import inside, kill, marked, read_proc, signal_all

__all__ = ["Cluster", "ClusterError", "claim_ports", "missing"]

# A node's init restarts slurmd unless the file `down` exists, and reaps the processes of jobs.
INIT = "while :; do [ -e {spool}/down ] || {slurmd} -D -N {node} >>{log} 2>&1; sleep 0.2; done"


class Cluster(Daemons):
    """A running private Slurm.

    Its options hold from start to stop, but for those that `reconfigure` changes.
    """

    def __init__(
        self,
        nodes: int = 2,
        cpus: int = 4,
        gpus: int = 0,
        accounting: bool = False,
        preempt_user_signal: bool = False,
        preempt_mode: str = "REQUEUE",
        requeue: bool = True,
        max_array: int = 1001,
        grace: int = 30,
        kill_wait: int = 10,
        affinity: bool = False,
        gpu_type: str = "",
        limits: bool = False,
        min_job_age: int = 3600,
        hide_jobs: bool = False,
        directory: str | Path | None = None,
        detached: bool = False,
    ) -> None:
        """Nothing starts yet.

        limits: those of sacctmgr hold, such as MaxSubmitJobs; needs accounting. min_job_age:
        seconds after which slurmctld forgets a job that has ended. hide_jobs: users see their own
        jobs alone (PrivateData). preempt_mode: REQUEUE, CANCEL or SUSPEND.
        directory: created and removed by this class; its path is short, as Unix sockets need.
        detached: the daemons outlive the process that starts them.
        """
        unique = f"{os.getpid()}-{random.randrange(16**4):04x}"
        folder = Path(directory or f"/tmp/tc-{unique}")
        if len(str(folder)) > 60:
            reason = "too long for Unix sockets; take a folder of at most 60 characters"
            raise ClusterError(f"{folder}: {reason}")
        super().__init__(folder, detached)
        self.options: dict[str, Any] = {
            "nodes": nodes,
            "cpus": cpus,
            "gpus": gpus,
            "accounting": accounting,
            "grace": grace,
            "preempt_user_signal": preempt_user_signal,
            "preempt_mode": preempt_mode,
            "requeue": requeue,
            "max_array": max_array,
            "kill_wait": kill_wait,
            "affinity": affinity,
            "gpu_type": gpu_type,
            "limits": limits,
            "min_job_age": min_job_age,
            "hide_jobs": hide_jobs,
        }
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.profile = folder / "testcluster.yaml"
        self.namespaces = False

    @classmethod
    def load(cls, directory: Path) -> Cluster | None:
        """The cluster that was started in this folder; None when there is none."""
        try:
            saved = json.loads((directory / "cluster.json").read_text())
        except FileNotFoundError:
            return None
        self = cls(**saved["options"], directory=directory, detached=True)
        self.ports = saved["ports"]
        self.namespaces = saved["namespaces"]
        for name, (pid, born) in saved["processes"].items():
            self.processes[name] = (pid, born)
        return self

    def spawn(self, name: str, *words: str) -> None:
        """Start a daemon or a node, and write down what `load` needs."""
        super().spawn(name, *words)
        state = {
            "options": self.options,
            "ports": self.ports,
            "processes": self.processes,
            "namespaces": self.namespaces,
        }
        (self.dir / "cluster.json").write_text(json.dumps(state))

    # --- life

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> Cluster:
        """Start all daemons and wait until all nodes are idle; else raise ClusterError."""
        if line := missing(self.options["accounting"]):
            raise ClusterError(f"Slurm's programs are not all here; as root: {line}")
        self.dir.mkdir(mode=0o755)
        try:
            for name in ("etc", "log", "run", "state", "dev", "spool"):
                (self.dir / name).mkdir()
            for node in self.nodes:
                (self.dir / "spool" / node).mkdir()
            names = ["ctld", "dbd", "sql", *self.nodes]
            self._claims = claim_ports(len(names))
            for name, claim in zip(names, self._claims, strict=True):
                self.ports[name] = claim.getsockname()[1]
            self.namespaces = has_namespaces()
            self._write_files()
            self.start_munge()
            if self.options["accounting"]:
                self.install_accounting()
            self.start_controller()
            for node in self.nodes:
                self.boot(node)
            self.wait_idle()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop everything, nodes first so that no daemon waits for them, and remove the folder."""
        for node in self.nodes:
            self.power_cut(node)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self.end(name)
        self.release()
        shutil.rmtree(self.dir, ignore_errors=True)

    def _write_files(self) -> None:
        write_files(self.dir, self.user, self.nodes, self.ports, self.options)

    # --- state

    def jobs(self) -> dict[str, str]:
        """Return all jobs and array indices that slurmctld knows: {'12_3': 'RUNNING'}."""
        rows = self.run("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines()
        return dict(row.split() for row in rows)

    def node_states(self) -> dict[str, str]:
        rows = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines()
        return dict(row.split() for row in rows)

    def wait_idle(self) -> None:
        """Wait until every node answers and nothing runs on it."""
        idle = dict.fromkeys(self.nodes, "idle")
        self.until(lambda: self.node_states() == idle, "all nodes are idle")

    def clean(self) -> None:
        """Bring the cluster back to its first state: no jobs, every node up and idle."""
        if not self.alive("slurmctld"):
            self.start_controller()
        for node in self.nodes:
            self.thaw(node)
            self.boot(node)
        self.run("scancel", "--user", self.user, check=False)
        for node, state in self.node_states().items():
            if state.rstrip("*") not in ("idle", "allocated", "mixed", "completing"):
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self.wait_idle()

    # --- faults, and their repair

    def power_cut(self, node: str) -> None:
        """Kill slurmd, its steps and every task of a node at once, without a signal before."""
        kill(self.members(node))

    def boot(self, node: str) -> None:
        """Power a node on, or start its slurmd again."""
        spool = self.dir / "spool" / node
        (spool / "down").unlink(missing_ok=True)
        if self.members(node):
            return
        log = self.dir / f"log/{node}.log"
        init = INIT.format(spool=spool, slurmd=find_program("slurmd"), node=node, log=log)
        words = ["sh", "-c", init]
        if not self.namespaces:
            self.spawn(node, *words)
            return
        user = os.geteuid()
        if user:  # back from root of the namespace to the user
            mapping = [f"--map-user={user}", f"--map-group={os.getegid()}"]
            words = ["unshare", "--user", *mapping, *words]
        hosts = f"mount --bind {self.dir}/etc/hosts /etc/hosts"
        prepare = f"hostname {node}; {hosts}; exec {shlex.join(words)}"
        self.spawn(node, *unshare(), "sh", "-c", prepare)

    def freeze(self, node: str) -> None:
        """Stop all processes of a node; none of them ends."""
        signal_all(signal.SIGSTOP, self.members(node))

    def thaw(self, node: str) -> None:
        signal_all(signal.SIGCONT, self.members(node))

    def hide(self, node: str, folder: Path) -> None:
        """Mount an empty filesystem over this folder on a node, until its power is cut.

        Needs namespaces.
        """
        enter = ["nsenter", f"--target={self.slurmd_pids(node)[0]}", "--mount"]
        if os.geteuid():
            enter += ["--user", "--preserve-credentials"]
        self.run(*enter, "mount", "-t", "tmpfs", "-o", "ro", "none", str(folder))

    def kill_slurmd(self, node: str) -> None:
        """Kill slurmd alone; steps and tasks continue. `boot` starts it again."""
        (self.dir / f"spool/{node}/down").touch()
        kill(self.slurmd_pids(node))

    def slurmd_pids(self, node: str) -> list[int]:
        """Return the pids of slurmd on a node."""
        return [pid for pid in self.members(node) if read_proc(pid, "comm") == [b"slurmd\n"]]

    def reconfigure(self, **options: Any) -> None:
        """Change options of slurm.conf, such as requeue or grace, while the cluster runs."""
        self.options.update(options)
        self._write_files()
        self.restart_controller()
        self.run("scontrol", "reconfigure")
        self.wait_idle()

    def members(self, node: str) -> list[int]:
        """Return the pids of all processes on a node, its init first.

        They share a namespace, or an environment where there are no namespaces.
        """
        init, _ = self.processes.get(node, (0, 0))
        alive = self.alive(node)
        if self.namespaces:
            return [init, *inside(init)] if alive else []
        own = {f"TESTCLUSTER={self.dir}", f"TESTCLUSTER_NODE={node}"}  # slurmd and its steps
        tasks = {f"SLURM_CONF={self.conf}", f"SLURMD_NODENAME={node}"}
        pids = marked(own, tasks)
        if alive:
            pids = [init, *(pid for pid in pids if pid != init)]
        return pids


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=["start", "stop", "status"])
    folder = Path(f"/tmp/testcluster-{os.getuid()}")
    parser.add_argument("--dir", type=Path, default=folder, help="its folder (%(default)s)")
    cpus = "CPUs per node, more than there are is fine (%(default)s)"
    for name, default, text in (
        ("--nodes", 2, "nodes (%(default)s)"),
        ("--cpus", 4, cpus),
        ("--gpus", 0, "fake GPUs per node (%(default)s)"),
        ("--grace", 30, "seconds from preemption to KILL (%(default)s)"),
        ("--kill-wait", 5, "seconds from scancel or the time limit to KILL (%(default)s)"),
    ):
        parser.add_argument(name, type=int, default=default, help=text)
    for name, text in (
        ("--accounting", "slurmdbd and MariaDB too, so that sacct works"),
        ("--preempt-user-signal", "preemption sends the job's USR2 first"),
        ("--affinity", "bind each task to its cores; give --cpus as many as there are"),
    ):
        parser.add_argument(name, action="store_true", help=text)
    arguments = vars(parser.parse_args())
    verb = arguments.pop("verb")
    folder = arguments.pop("dir")
    running = Cluster.load(folder)
    if verb == "start" and running is None:
        running = Cluster(**arguments, directory=folder, detached=True).start()
    if running is None:
        print(f"no cluster in {folder}", file=sys.stderr)
        return int(verb == "status")
    if verb == "stop":
        running.stop()
        return 0
    print(running.run("sinfo", "-N", "-l"), file=sys.stderr)
    print(f"export SLURM_CONF={running.conf}")
    print(f"jepa plan sweeps/demo.yaml --cluster {running.profile}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ClusterError as e:
        sys.exit(f"testcluster: {e}")
