"""Two users of one root on a real Slurm: what each sees, and how one continues the other's work."""

import grp
import os
import pwd
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.login_node import LoginNode, orders, stub_sweep
from support.users import group_folder, needs_root
from testcluster import Cluster

# Slurm looks users up by name, so these are two of Debian's own, in the group of the second one.
ALICE, BOB = "daemon", "games"


class User(LoginNode):
    """The commands of one user, who shares group and umask with the other."""

    def __init__(self, login: LoginNode, name: str, python: Path) -> None:
        self.__dict__.update(vars(login))
        self.prefix = (
            "setpriv",
            f"--reuid={name}",
            f"--regid={BOB}",
            "--clear-groups",
            "sh",
            "-c",
            'umask 002; exec "$@"',
            name,
            str(python),
            "-m",
            "jepa_cluster",
        )

    def jepa(self, *words: str, check: bool = True, **more: str) -> str:
        env = self.environment(HOME=str(self.folder), **more)
        return self.cluster.run(*self.prefix, *words, check=check, cwd=self.folder, env=env)

    def refusal(self, *words: str) -> str:
        """Return what a command that must fail prints to stderr."""
        done = subprocess.run(
            (*self.prefix, *words),
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={**self.cluster.env, **self.environment(HOME=str(self.folder))},
        )
        assert done.returncode
        return done.stderr


def python_for_all(folder: Path) -> Path:
    """Make an environment with our packages from an interpreter that every user may run."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run([f"/usr/bin/{version}", "-m", "venv", "--without-pip", folder], check=True)
    packages = folder / "lib" / version / "site-packages"
    (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin" / "python"


@pytest.fixture
def users(slurm: None) -> Iterator[tuple[User, User]]:
    with group_folder() as folder, Cluster(nodes=2, accounting=True, hide_jobs=True) as cluster:
        login = LoginNode(cluster, folder, stub=True)
        orders(login, hold=5)
        python = python_for_all(folder / "python")
        for path in (folder, *folder.rglob("*")):
            os.lchown(path, *owner(ALICE))
        (folder / "root").chmod(0o2775)
        yield User(login, ALICE, python), User(login, BOB, python)


def owner(name: str) -> tuple[int, int]:
    """Return the id of a user, and that of the group which both share."""
    return pwd.getpwnam(name).pw_uid, grp.getgrnam(BOB).gr_gid


@pytest.mark.slow
@needs_root
def test_a_colleague_starts_nothing_twice_and_continues_what_was_stopped(
    users: tuple[User, User],
) -> None:
    """First Slurm hides the jobs of others, then it shows them."""
    alice, bob = users
    file = stub_sweep(alice, "both", seeds=3)
    alice.cluster.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    first, second, waiting = alice.submit(file)
    alice.wait_step(first, 5)
    alice.wait_step(second, 5)

    # What is hidden is not guessed, and nothing is submitted.
    states = bob.states("both")
    assert [states[trial.name] for trial in (first, second)] == ["running"] * 2
    refused = bob.refusal("submit", str(file), "--yes")
    assert "Slurm hides the jobs of other users (PrivateData)" in refused
    assert "the user who submitted these trials can submit the sweep" in refused
    assert len(alice.arrays("both")) == 1

    # What is shown is kept. A colleague may ask for a stop, and resumes as himself.
    conf = alice.cluster.conf
    conf.write_text(conf.read_text().replace("PrivateData=jobs", ""))
    alice.cluster.run("scontrol", "reconfigure")
    assert "nothing to do" in bob.jepa("submit", str(file), "--yes")
    bob.jepa("cancel", "both", "0", "--yes")
    alice.wait(lambda: alice.states("both")[first.name] == "stopped", "it has stopped")
    alice.release()
    bob.jepa("resume", "both", "0", "--yes")
    bob.wait_done([first, second, waiting])
    assert first.attempt(2).owner() == BOB
    assert second.attempt(1).owner() == ALICE
