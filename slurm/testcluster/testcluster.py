#!/usr/bin/env python3
"""A private, throw-away, real Slurm: several nodes on this one machine, for tests and for trying things out.

In: how many nodes, CPUs and (fake) GPUs. Out: running daemons on loopback ports, a `slurm.conf` to export and a
cluster profile. As a script: `testcluster.py start | stop | status`. As a module: `with Cluster(nodes=2) as c:`.
Standard library only; it knows nothing of jepa_cluster. Needs Slurm's own programs (`missing()` tells how to get
them). Works as root and as an ordinary user; every node is a namespace of its own where the kernel lets us, with
its own host name, so that a power cut is a power cut. All it leaves is what `stop` removes: one folder in /tmp.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from processes import birth, inside, kill, marked, read_proc, signal_all

HERE = Path(__file__).resolve().parent
PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
ACCOUNTING_PACKAGES = "slurmdbd mariadb-server-core mariadb-client-core"
PATH = os.pathsep.join([os.environ.get("PATH", "/usr/bin:/bin"), "/usr/sbin", "/sbin", "/usr/local/sbin"])

# A node's init: keeps slurmd up unless the file `down` says otherwise, and reaps what jobs leave behind.
INIT = "while :; do [ -e {spool}/down ] || {slurmd} -D -N {node} >>{log} 2>&1; sleep 0.2; done"

PROFILE = """\
# A profile of the cluster that testcluster.py started here; gone when it stops. The GPUs are fake, hence device: cpu.
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


class ClusterError(RuntimeError):
    """The private Slurm cannot start or does not answer; the text holds the evidence."""


def missing(accounting: bool = False) -> str:
    """'' when Slurm's programs are here, else the one line that brings them."""
    programs = ["slurmctld", "slurmd", "sbatch", "munged"] + ["slurmdbd", "mariadbd"] * accounting
    if all(shutil.which(p, path=PATH) for p in programs):
        return ""
    packages = f"{PACKAGES} {ACCOUNTING_PACKAGES}" if accounting else PACKAGES
    return f"apt-get install --no-install-recommends -y {packages}"


def claim_ports(count: int) -> list[socket.socket]:
    """Claim free TCP ports on loopback, below 20000 (above, the kernel hands them out itself).

    A claim is a socket of UDP on the same port: another process that claims ports passes it by, and a server can listen
    there. Close it when the server has ended.
    """
    claims: list[socket.socket] = []
    for port in random.sample(range(12000, 20000), 8000):
        claim = socket.socket(type=socket.SOCK_DGRAM)
        with socket.socket() as server:
            try:
                claim.bind(("127.0.0.1", port))
                server.bind(("127.0.0.1", port))
            except OSError:
                claim.close()
                continue
        claims.append(claim)
        if len(claims) == count:
            return claims
    raise ClusterError(f"no {count} free ports between 12000 and 20000 on loopback")


class Cluster:
    """A running private Slurm. Its options hold from start to stop, but for those that `reconfigure` changes."""

    def __init__(
        self,
        nodes: int = 2,
        cpus: int = 4,
        gpus: int = 0,
        accounting: bool = False,
        preempt_user_signal: bool = False,
        requeue: bool = True,
        max_array: int = 1001,
        grace: int = 30,
        directory: str | Path | None = None,
        detached: bool = False,
    ) -> None:
        """directory: ours to make and remove; short, as socket paths are. detached: outlives its starter."""
        self.dir = Path(directory or f"/tmp/tc-{os.getpid()}-{random.randrange(16**4):04x}")
        if len(str(self.dir)) > 60:
            raise ClusterError(f"{self.dir}: too long for Unix sockets; take a folder of at most 60 characters")
        self.options: dict[str, Any] = {
            "nodes": nodes, "cpus": cpus, "gpus": gpus, "accounting": accounting, "grace": grace,
            "preempt_user_signal": preempt_user_signal, "requeue": requeue, "max_array": max_array,
        }  # fmt: skip
        self.detached = detached
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.name = "".join(c for c in self.dir.name if c.isalnum())
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        self.conf = self.dir / "etc/slurm.conf"
        self.profile = self.dir / "testcluster.yaml"
        self.ports: dict[str, int] = {}
        self.processes: dict[str, tuple[int, int]] = {}  # daemon or node -> (pid, birth)
        self.namespaces = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._claims: list[socket.socket] = []

    @classmethod
    def load(cls, directory: Path) -> Cluster | None:
        """The cluster that was started in this folder; None when there is none."""
        try:
            saved = json.loads((directory / "cluster.json").read_text())
        except FileNotFoundError:
            return None
        self = cls(**saved["options"], directory=directory, detached=True)
        self.ports, self.namespaces = saved["ports"], saved["namespaces"]
        self.processes = {k: (v[0], v[1]) for k, v in saved["processes"].items()}
        return self

    # --- life

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> Cluster:
        """Everything up and all nodes idle, or ClusterError with the logs' last lines."""
        if line := missing(self.options["accounting"]):
            raise ClusterError(f"Slurm's programs are not all here; as root: {line}")
        self.dir.mkdir(mode=0o755)
        try:
            for sub in ("etc", "log", "run", "state", "dev", *(f"spool/{n}" for n in self.nodes)):
                (self.dir / sub).mkdir(parents=True)
            names = ["ctld", "dbd", "sql", *self.nodes]
            self._claims = claim_ports(len(names))
            self.ports = {name: claim.getsockname()[1] for name, claim in zip(names, self._claims, strict=True)}
            self.namespaces = subprocess.run([*_unshare(), "true"], capture_output=True, check=False).returncode == 0
            self._write_files()
            self._munge()
            if self.options["accounting"]:
                self._accounting()
            self.start_controller()
            for node in self.nodes:
                self.boot(node)
            self.wait_idle()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Everything down, nodes first so that nobody waits for them, and the folder gone."""
        for node in self.nodes:
            self.power_cut(node)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(name)
        for child in self._children:
            child.wait()
        for claim in self._claims:
            claim.close()
        shutil.rmtree(self.dir, ignore_errors=True)

    # --- what its user wants of it

    @property
    def env(self) -> dict[str, str]:
        """The environment of a user of this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.conf), "PATH": PATH}

    def run(self, *words: str, check: bool = True, env: dict[str, str] | None = None, **keywords: Any) -> str:
        """A command on the cluster's 'login node' -> its stdout. check: ClusterError when it fails."""
        env = {**self.env, **(env or {})}
        done = subprocess.run(words, capture_output=True, text=True, env=env, check=False, **keywords)
        if check and done.returncode:
            raise ClusterError(f"{shlex.join(words)} -> {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """Every job and array index slurmctld remembers, ended ones too: {'12_3': 'RUNNING'}."""
        rows = self.run("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines()
        return dict(row.split() for row in rows)

    def node_states(self) -> dict[str, str]:
        rows = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines()
        return dict(row.split() for row in rows)

    def wait_idle(self) -> None:
        """Until every node answers and nothing runs on it."""
        self.until(lambda: list(self.node_states().values()) == ["idle"] * len(self.nodes), "all nodes are idle")

    def until(self, ready: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Wait for it; a ClusterError inside is a no. ClusterError with the logs' last lines when it does not come."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if ready():
                    return
            except ClusterError as e:
                what = f"{what.splitlines()[0]}\n{e}"
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in (self.dir / "log").iterdir())
                raise ClusterError(f"waited {seconds:g} s in vain until {what}\n{logs}")
            time.sleep(0.1)

    def clean(self) -> None:
        """As freshly started: no jobs, every node powered, up and resumed. For between two tests."""
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
        """slurmd, its steps and every task gone in one instant, without a word."""
        kill(self.members(node))

    def boot(self, node: str) -> None:
        """Power a node on, or bring back its slurmd."""
        spool = self.dir / "spool" / node
        (spool / "down").unlink(missing_ok=True)
        if self.members(node):
            return
        init = INIT.format(spool=spool, slurmd=_program("slurmd"), node=node, log=self.dir / f"log/{node}.log")
        words = ["sh", "-c", init]
        if self.namespaces:
            user, group = os.geteuid(), os.getegid()
            back = ["unshare", "--user", f"--map-user={user}", f"--map-group={group}"] if user else []
            prepare = f"hostname {node}; mount --bind {self.dir}/etc/hosts /etc/hosts; exec "
            words = [*_unshare(), "sh", "-c", prepare + shlex.join([*back, *words])]
        self._spawn(node, *words)

    def freeze(self, node: str) -> None:
        """The node hangs: nothing on it runs, nothing on it dies."""
        signal_all(signal.SIGSTOP, self.members(node))

    def thaw(self, node: str) -> None:
        signal_all(signal.SIGCONT, self.members(node))

    def hide(self, node: str, folder: Path) -> None:
        """The node no longer sees what is in this folder, until its power is cut. Needs namespaces."""
        user = ["--user", "--preserve-credentials"] if os.geteuid() else []
        slurmd = next(p for p in self.members(node) if read_proc(p, "comm") == [b"slurmd\n"])
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)]
        self.run("nsenter", f"--target={slurmd}", "--mount", *user, *mount)

    def kill_slurmd(self, node: str) -> None:
        """slurmd alone dies; steps and tasks run on. `boot` brings it back."""
        (self.dir / f"spool/{node}/down").touch()
        kill([p for p in self.members(node) if read_proc(p, "comm") == [b"slurmd\n"]])

    def stop_controller(self) -> None:
        self._end("slurmctld")

    def start_controller(self) -> None:
        """Also after `stop_controller`: it recovers its state from disk."""
        self._spawn("slurmctld", _program("slurmctld"), "-D")
        self.until(lambda: " UP" in self.run("scontrol", "ping", check=False), "slurmctld answers")

    def restart_controller(self) -> None:
        self.stop_controller()
        self.start_controller()

    def stop_accounting(self) -> None:
        self._end("slurmdbd")

    def start_accounting(self) -> None:
        """Also after `stop_accounting`."""
        self._spawn("slurmdbd", _program("slurmdbd"), "-D")
        self.until(lambda: self.run("sacctmgr", "show", "cluster"), "slurmdbd answers")

    def reconfigure(self, **options: Any) -> None:
        """Change preempt_user_signal, requeue, max_array or grace of the running cluster."""
        self.options.update(options)
        self._write_files()
        self.restart_controller()
        self.run("scontrol", "reconfigure")
        self.wait_idle()

    def alive(self, name: str) -> bool:
        """Whether a daemon's or a node's process lives, and is still that process."""
        pid, born = self.processes.get(name, (0, 0))
        return bool(pid) and birth(pid) == born

    def members(self, node: str) -> list[int]:
        """Pids of everything on a node, its init first. By namespace, or by the environment where there is none."""
        init = self.processes.get(node, (0, 0))[0]
        first = [init] if self.alive(node) else []
        if self.namespaces:
            return first + (inside(init) if first else [])
        own = {f"TESTCLUSTER={self.dir}", f"TESTCLUSTER_NODE={node}"}  # slurmd and its steps
        tasks = {f"SLURM_CONF={self.conf}", f"SLURMD_NODENAME={node}"}
        return first + [p for p in marked(own, tasks) if p not in first]

    # --- daemons and their files

    def _write_files(self) -> None:
        o, etc = self.options, self.dir / "etc"
        extra = ["SlurmctldParameters=preempt_send_user_signal"] * o["preempt_user_signal"]
        if o["accounting"]:
            extra += ["AccountingStorageType=accounting_storage/slurmdbd", "AccountingStorageHost=127.0.0.1"]
            extra += [f"AccountingStoragePort={self.ports['dbd']}"]
            extra += [f"AccountingStoragePass={self.dir}/run/munge.sock"]
        if o["gpus"]:  # a bare Count= without files makes slurmd refuse the node
            extra.append("GresTypes=gpu")
            files = [self.dir / f"dev/gpu{i}" for i in range(o["gpus"])]
            for file in files:
                file.unlink(missing_ok=True)
                file.symlink_to("/dev/null")
            rows = (f"NodeName={n} Name=gpu File={f}\n" for n in self.nodes for f in files)
            (etc / "gres.conf").write_text("".join(rows))
        values = {
            **o, "name": self.name, "dir": self.dir, "user": self.user, "ports": self.ports,
            "host": socket.gethostname().split(".")[0], "nodes": ",".join(self.nodes), "requeue": int(o["requeue"]),
            "node_ports": ",".join(str(self.ports[n]) for n in self.nodes), "extra": "\n".join(extra),
            "gres": f"Gres=gpu:{o['gpus']}" if o["gpus"] else "",
        }  # fmt: skip
        self.conf.write_text((HERE / "slurm.conf.in").read_text().format(**values))
        (etc / "slurmdbd.conf").touch(mode=0o600)
        (etc / "slurmdbd.conf").write_text((HERE / "slurmdbd.conf.in").read_text().format(**values))
        (etc / "hosts").write_text("".join(f"127.0.0.1 {n}\n" for n in ("localhost", values["host"], *self.nodes)))
        self.profile.write_text(PROFILE.format(gpus=o["gpus"], shape=min(2, len(self.nodes))))

    def _munge(self) -> None:
        key, run = self.dir / "etc/munge.key", self.dir / "run"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"key-file": key, "socket": run / "munge.sock", "pid-file": run / "munged.pid",
                 "seed-file": run / "munged.seed", "log-file": self.dir / "log/munged.log"}  # fmt: skip
        options = [f"--{name}={path}" for name, path in files.items()]
        self._spawn("munged", _program("munged"), "--foreground", "--force", *options)
        self.until((run / "munge.sock").exists, "munged listens")

    def _accounting(self) -> None:
        sock, user = self.dir / "run/sql.sock", f"--user={self.user}"
        place = ["--no-defaults", f"--datadir={self.dir}/sql", user]
        self.run("mariadb-install-db", *place, "--auth-root-authentication-method=normal", "--skip-test-db")
        self._spawn("mariadbd", _program("mariadbd"), *place, f"--socket={sock}", f"--pid-file={sock}.pid",
                    "--bind-address=127.0.0.1", f"--port={self.ports['sql']}", "--innodb-buffer-pool-size=64M",
                    "--innodb-flush-log-at-trx-commit=0")  # fmt: skip
        self.until(sock.exists, "mariadbd listens")
        who = f"'{self.user}'@'127.0.0.1'"
        grant = f"CREATE USER IF NOT EXISTS {who}; GRANT ALL ON *.* TO {who};"
        self.run("mariadb", "--no-defaults", f"--socket={sock}", "-u", "root", "-e", grant)
        self.start_accounting()
        for words in (("cluster", self.name), ("account", "lab"), ("user", self.user, "account=lab")):
            self.run("sacctmgr", "-i", "add", *words)

    def _spawn(self, name: str, *words: str) -> None:
        end = [] if self.detached else ["setpriv", "--pdeathsig", "KILL"]  # a killed test run leaves no daemons
        env = {**self.env, "TESTCLUSTER": str(self.dir), "TESTCLUSTER_NODE": name}
        with (self.dir / f"log/{name}.log").open("ab") as out:
            child = subprocess.Popen(
                [*end, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )
        self._children.append(child)
        self.processes[name] = (child.pid, birth(child.pid))
        keep = ("options", "ports", "processes", "namespaces")
        (self.dir / "cluster.json").write_text(json.dumps({k: getattr(self, k) for k in keep}))

    def _end(self, name: str) -> None:
        """TERM, five seconds, KILL."""
        pid = self.processes.get(name, (0, 0))[0]
        deadline = time.monotonic() + 5
        while self.alive(name):
            late = time.monotonic() > deadline
            signal_all(signal.SIGKILL if late else signal.SIGTERM, [pid])
            time.sleep(0.05)


def _program(name: str) -> str:
    return shutil.which(name, path=PATH) or name


def _unshare() -> list[str]:
    """The command in front of a node: namespaces for host name, mounts and processes, which die with it."""
    user = ["--user", "--map-root-user"] if os.geteuid() else []
    return ["unshare", *user, "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("verb", choices=["start", "stop", "status"])
    p.add_argument("--dir", type=Path, default=Path(f"/tmp/testcluster-{os.getuid()}"), help="its folder (%(default)s)")
    p.add_argument("--nodes", type=int, default=2, help="nodes (%(default)s)")
    p.add_argument("--cpus", type=int, default=4, help="CPUs a node, more than there are is fine (%(default)s)")
    p.add_argument("--gpus", type=int, default=0, help="fake GPUs a node (%(default)s)")
    p.add_argument("--grace", type=int, default=30, help="seconds from preemption to KILL (%(default)s)")
    p.add_argument("--accounting", action="store_true", help="slurmdbd and MariaDB too, so that sacct works")
    p.add_argument("--preempt-user-signal", action="store_true", help="preemption sends the job's USR2 first")
    a = p.parse_args()
    running = Cluster.load(a.dir)
    if a.verb == "start" and running is None:
        options = {k: v for k, v in vars(a).items() if k not in ("verb", "dir")}
        running = Cluster(**options, directory=a.dir, detached=True).start()
    if running is None:
        print(f"no cluster in {a.dir}", file=sys.stderr)
        return int(a.verb == "status")
    if a.verb == "stop":
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
