"""The daemons of a cluster: start, wait for and end them, and run commands as their user."""

from __future__ import annotations

import os
import pwd
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configuration import cluster_name
from machine import PATH, ClusterError, find_program
from processes import birth, signal_all


class Daemons:
    """Processes of one cluster, each with a log in its folder."""

    def __init__(self, folder: Path, detached: bool) -> None:
        """detached: the daemons outlive the process that starts them."""
        self.dir = folder
        self.detached = detached
        self.conf = folder / "etc/slurm.conf"
        self.name = cluster_name(folder)
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        self.ports: dict[str, int] = {}
        self.processes: dict[str, tuple[int, int]] = {}  # daemon or node -> (pid, birth)
        self._children: list[subprocess.Popen[bytes]] = []
        self._claims: list[socket.socket] = []

    @property
    def env(self) -> dict[str, str]:
        """The environment of a user of this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.conf), "PATH": PATH}

    def run(
        self, *words: str, check: bool = True, env: dict[str, str] | None = None, **keywords: Any
    ) -> str:
        """Run a command on the cluster's login node and return its stdout.

        check: raise ClusterError when it fails.
        """
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            env={**self.env, **(env or {})},
            check=False,
            **keywords,
        )
        if check and done.returncode:
            output = f"{done.stdout}{done.stderr}"
            raise ClusterError(f"{shlex.join(words)} -> {done.returncode}\n{output}")
        return done.stdout

    def until(self, ready: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Wait until `ready` returns true; a ClusterError inside counts as false.

        After `seconds`: ClusterError with the last lines of all logs.
        """
        deadline = time.monotonic() + seconds
        error = ""
        while True:
            try:
                if ready():
                    return
            except ClusterError as e:
                error = f"\n{e}"
            if time.monotonic() > deadline:
                raise ClusterError(f"not within {seconds:g} s: {what}{error}\n{self.log_ends()}")
            time.sleep(0.1)

    def log_ends(self) -> str:
        """Return the last lines of all logs."""
        ends = ""
        for log in (self.dir / "log").iterdir():
            ends += f"--- {log.name}\n{log.read_text()[-1500:]}\n"
        return ends

    def alive(self, name: str) -> bool:
        """Whether a daemon's or a node's process lives, and is still that process."""
        pid, born = self.processes.get(name, (0, 0))
        return bool(pid) and birth(pid) == born

    def spawn(self, name: str, *words: str) -> None:
        """Start a daemon or a node."""
        command = list(words)
        if not self.detached:  # a killed test run leaves no daemons
            command = ["setpriv", "--pdeathsig", "KILL", *words]
        with (self.dir / f"log/{name}.log").open("ab") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.env, "TESTCLUSTER": str(self.dir), "TESTCLUSTER_NODE": name},
                start_new_session=True,
            )
        self._children.append(child)
        self.processes[name] = (child.pid, birth(child.pid))

    def end(self, name: str) -> None:
        """Send TERM; after five seconds KILL."""
        pid, _ = self.processes.get(name, (0, 0))
        deadline = time.monotonic() + 5
        number = signal.SIGTERM
        while self.alive(name):
            if time.monotonic() > deadline:
                number = signal.SIGKILL
            signal_all(number, [pid])
            time.sleep(0.05)

    def release(self) -> None:
        """Wait for the children that have ended, and give the ports back."""
        for child in self._children:
            child.wait()
        for claim in self._claims:
            claim.close()

    def start_munge(self) -> None:
        key = self.dir / "etc/munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        run = self.dir / "run"
        self.spawn(
            "munged",
            find_program("munged"),
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={run}/munge.sock",
            f"--pid-file={run}/munged.pid",
            f"--seed-file={run}/munged.seed",
            f"--log-file={self.dir}/log/munged.log",
        )
        self.until((run / "munge.sock").exists, "munged listens")

    def install_accounting(self) -> None:
        """Start MariaDB and slurmdbd, and add the cluster and its user."""
        sock = self.dir / "run/sql.sock"
        data = ["--no-defaults", f"--datadir={self.dir}/sql", f"--user={self.user}"]
        install = ["mariadb-install-db", *data, "--auth-root-authentication-method=normal"]
        self.run(*install, "--skip-test-db")
        self.spawn(
            "mariadbd",
            find_program("mariadbd"),
            *data,
            f"--socket={sock}",
            f"--pid-file={sock}.pid",
            "--bind-address=127.0.0.1",
            f"--port={self.ports['sql']}",
            "--innodb-buffer-pool-size=64M",
            "--innodb-flush-log-at-trx-commit=0",
        )
        self.until(sock.exists, "mariadbd listens")
        who = f"'{self.user}'@'127.0.0.1'"
        grant = f"CREATE USER IF NOT EXISTS {who}; GRANT ALL ON *.* TO {who};"
        self.run("mariadb", "--no-defaults", f"--socket={sock}", "-u", "root", "-e", grant)
        self.start_accounting()
        add = ("sacctmgr", "-i", "add")
        self.run(*add, "cluster", self.name)
        self.run(*add, "account", "lab")
        self.run(*add, "user", self.user, "account=lab")

    def start_accounting(self) -> None:
        """Start slurmdbd, also after `stop_accounting`."""
        self.spawn("slurmdbd", find_program("slurmdbd"), "-D")
        self.until(lambda: self.run("sacctmgr", "show", "cluster"), "slurmdbd answers")

    def stop_accounting(self) -> None:
        self.end("slurmdbd")

    def start_controller(self) -> None:
        """Start slurmctld; after `stop_controller` it recovers its state from disk."""
        self.spawn("slurmctld", find_program("slurmctld"), "-D")
        self.until(lambda: " UP" in self.run("scontrol", "ping", check=False), "slurmctld answers")

    def stop_controller(self) -> None:
        self.end("slurmctld")

    def restart_controller(self) -> None:
        self.stop_controller()
        self.start_controller()
