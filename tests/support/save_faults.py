"""What the tests of save faults share: the trial, and what must hold, always and at the end."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import tiny_trial
from support.attempts import assert_same_bits, wait_for
from support.faulty_rank import Fault
from support.nodes import Cluster, Filesystem, NodeRanks

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import ExitCode
from jepa_cluster.training.checkpoint_files import MANIFEST, check_file, read_manifest
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.spool import read

STEPS = 12
MILESTONE = 3
OVERRIDES: dict[str, Any] = {"optim.steps": STEPS, "runtime.milestone_every": MILESTONE}
OFTEN = {"runtime.checkpoint_minutes": 0.005}  # besides the milestones
# codes after which a launcher starts the trial again
AGAIN = {ExitCode.PREEMPTED, ExitCode.HANG, -9}
ATTEMPTS = 12
Strike = Callable[..., Fault]


@pytest.fixture(scope="module")
def undisturbed(
    two_nodes: Cluster, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, TrialDir]:
    """Undisturbed trials, by world size."""
    trials = {}
    config = tiny_trial.config(tiny_data, **OVERRIDES)
    for world in (2, 4):
        trials[world] = trial = Root(tmp_path_factory.mktemp("alone")).trial_of(config)
        trial.create(config)
        assert two_nodes.start(trial, world).wait() == [0] * world
    return trials


@pytest.fixture
def fault(tmp_path: Path) -> Strike:
    """fault(place, rank, action, ...) -> a Fault with a marker of its own."""
    numbers = itertools.count()

    def make(*words: Any, **more: Any) -> Fault:
        marker = tmp_path / f"struck{next(numbers)}"
        return Fault(*words, marker=str(marker), **more)

    return make


def new_trial(
    disk: Filesystem, tiny_config: Callable[..., TrialConfig], **overrides: Any
) -> TrialDir:
    """A frozen trial on this disk, without an attempt."""
    config = tiny_config(**{**OVERRIDES, **overrides})
    trial = Root(disk.path / "root").trial_of(config)
    trial.create(config)
    return trial


def assert_every_checkpoint_verifies(trial: TrialDir) -> None:
    """Each folder step-N holds exactly the files of its manifest, of these sizes and checksums."""
    for step in trial.committed():
        folder = trial.checkpoint(step)
        manifest = read_manifest(folder)
        faults: list[str] = []
        names = {MANIFEST}
        if isinstance(manifest, str):
            faults.append(manifest)
        else:
            for name, (size, crc) in manifest.files.items():
                names.add(name)
                faults += check_file(folder / name, size, crc)
            if manifest.step != step:
                faults.append(f"its manifest is of step {manifest.step}")
        if not folder.exists():  # no longer needed, and removed while it was read
            continue
        assert not faults, f"step {step}: {faults}"
        found = {path.name for path in folder.iterdir()}
        assert found in (names, set()) or not folder.exists()


def assert_done_is_true(trial: TrialDir) -> None:
    """A trial that says DONE has a last checkpoint, and all that it has verify."""
    assert_every_checkpoint_verifies(trial)
    done = read_json(trial.done)
    assert done is None or trial.committed()[-1:] == [done["step"]]


def finish(cluster: Cluster, trial: TrialDir, world: int) -> int:
    """Start attempts as a launcher does until the trial is done -> how many."""
    attempts = 0
    while not trial.done.exists():
        attempts += 1
        assert attempts < ATTEMPTS, "too many attempts"
        codes = cluster.start(trial, world).wait()
        assert not trial.failed.exists(), trial.failed.read_text()
        assert set(codes) <= {0, *AGAIN}, codes
        assert_done_is_true(trial)
    return attempts


def assert_unharmed(alone: TrialDir, trial: TrialDir) -> None:
    """The trial ended as the undisturbed one did, bit by bit, and left nothing half done."""
    done = read_json(trial.done)
    assert done is not None
    assert done["step"] == trial.read_config().recipe.optim.steps
    assert_done_is_true(trial)
    assert_same_bits(alone, trial)
    assert not list(trial.checkpoints.glob(".*"))
    assert not list(trial.checkpoints.glob("bad-*"))


def failures(trial: TrialDir) -> list[dict[str, Any]]:
    """The events that say that a save failed; one for each streak of failures."""
    return [event for event in read(trial).events if event["event"] == "checkpoint_failed"]


def last_step(trial: TrialDir) -> int:
    """Step of the newest row that reached the disk."""
    rows = read(trial).rows
    if not rows:
        return 0
    return rows[-1].step


def heartbeat_error(trial: TrialDir) -> str:
    """What rank 0's heartbeat says of the last save."""
    try:
        return json.loads(trial.heartbeat.read_text())["checkpoint"]["error"]
    except (OSError, ValueError, KeyError):
        return ""


def release(fault: Fault) -> None:
    """Let a blocked fault go on."""
    Path(f"{fault.marker}.go").touch()


def wait_for_strike(fault: Fault, ranks: NodeRanks) -> None:
    """Until a fault has struck, for which its ranks must live."""

    def struck() -> bool:
        assert Path(fault.marker).exists() or ranks.running, f"the attempt ended before {fault}"
        return Path(fault.marker).exists()

    wait_for(struck)


# ---- kills


@dataclass(frozen=True)
class Kill:
    """Where an attempt is held, and who is killed there. victims: "rank", or the number of a node.

    ordinary: for the normal suite; the others are for the slow tests.
    """

    place: str
    step: int
    victims: str | int = "rank"
    last_rank: bool = False
    after: bool = False
    skip: int = 0
    ordinary: bool = False

    @property
    def match(self) -> str:
        """The part of a path at which the attempt is held."""
        if self.place == "set_lr_and_decay":
            return ""
        if self.place == "rename":
            return f"/step-{self.step:08d}"
        return f".step-{self.step:08d}"


# none commits the checkpoint that the next one needs uncommitted, but for the last two
KILLS = (
    Kill("make_folder", MILESTONE),
    Kill("chunk", MILESTONE, last_rank=True, skip=1),
    Kill("chunk", MILESTONE, skip=1),
    # between two saves
    Kill("set_lr_and_decay", MILESTONE + 2, last_rank=True, skip=MILESTONE + 1, ordinary=True),
    Kill("chunk", 2 * MILESTONE, last_rank=True, skip=1, ordinary=True),
    Kill("rename", 2 * MILESTONE, victims=0),
    Kill("rename", 2 * MILESTONE, victims=0, after=True),
    Kill("rename", 3 * MILESTONE, victims=0, ordinary=True),
    Kill("write_file", 3 * MILESTONE, victims=1, skip=1),  # the manifest
    Kill("chunk", STEPS, last_rank=True, skip=1),
    Kill("rename", STEPS, victims=1, ordinary=True),
    Kill("rename", STEPS, victims=0, after=True),
)


def kill_an_attempt(
    cluster: Cluster, trial: TrialDir, world: int, kill: Kill, fault: Strike
) -> None:
    """One attempt that is killed there; those that were not killed leave by themselves."""
    before = trial.committed()
    rank = world - 1 if kill.last_rank else 0
    held = fault(kill.place, rank, "block", match=kill.match, after=kill.after, skip=kill.skip)
    ranks = cluster.start(trial, world, [held])
    wait_for_strike(held, ranks)
    victims = (held.rank,)
    if kill.victims != "rank":
        victims = ranks.of_node(int(kill.victims))
    ranks.kill(signal.SIGKILL, victims)
    release(held)
    codes = ranks.wait()
    assert set(codes) <= AGAIN, (kill, codes)
    assert {codes[rank] for rank in victims} == {-9}, (kill, codes)
    assert set(before[-2:]) <= set(trial.committed())
    assert_done_is_true(trial)
