"""What this machine provides for a cluster: Slurm's programs, free ports, namespaces."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess

PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
ACCOUNTING_PACKAGES = "slurmdbd mariadb-server-core mariadb-client-core"
SYSTEM_FOLDERS = ["/usr/sbin", "/sbin", "/usr/local/sbin"]
PATH = os.pathsep.join([os.environ.get("PATH", "/usr/bin:/bin"), *SYSTEM_FOLDERS])


class ClusterError(RuntimeError):
    """The private Slurm cannot start or does not answer; the text holds the evidence."""


def missing(accounting: bool = False) -> str:
    """Return '' when Slurm's programs are installed, else the command that installs them."""
    programs = ["slurmctld", "slurmd", "sbatch", "munged"]
    packages = PACKAGES
    if accounting:
        programs += ["slurmdbd", "mariadbd"]
        packages += f" {ACCOUNTING_PACKAGES}"
    if all(shutil.which(program, path=PATH) for program in programs):
        return ""
    return f"apt-get install --no-install-recommends -y {packages}"


def find_program(name: str) -> str:
    return shutil.which(name, path=PATH) or name


def claim_ports(count: int) -> list[socket.socket]:
    """Claim free TCP ports on loopback, below 20000 (above, the kernel hands them out itself).

    A claim is a socket of UDP on the same port: another process that claims ports passes it by, and
    a server can listen there. Close it when the server has ended.
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


def unshare() -> list[str]:
    """Return the command in front of a node's init.

    It makes namespaces for host name, mounts and processes, which end with it.
    """
    command = ["unshare"]
    if os.geteuid():
        command += ["--user", "--map-root-user"]
    return [*command, "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]


def has_namespaces() -> bool:
    """Whether the kernel lets this user make the namespaces of a node."""
    done = subprocess.run([*unshare(), "true"], capture_output=True, check=False)
    return done.returncode == 0
