"""How long the watchdog waits, and how it ends a rank."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from jepa_cluster.errors import ExitCode
from jepa_cluster.training import watchdog
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.watchdog import PhaseTimer, Watchdog
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import write_json

RANK_0 = DistEnv(0, 2, 0, 2, "launch")


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    for name in ("attempts", "checkpoints", "metrics"):
        (tmp_path / name).mkdir()
    trial = TrialDir(tmp_path)
    trial.claim({"launch": "launch"})
    return trial


class Ended(Exception):
    pass


class SimulatedClock:
    """The time of the watchdog. pauses: seconds that a look comes late, by its number."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.now, self.looks = 0.0, 0
        self.pauses: dict[int, float] = {}
        self.on_sleep: Callable[[], None] = lambda: None
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watchdog.time, "sleep", self.sleep)

    def sleep(
        self,
        seconds: float,
    ) -> None:
        self.looks += 1
        self.now += seconds + self.pauses.get(self.looks, 0.0)
        self.on_sleep()


def ended_by_watchdog(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch, watch: Watchdog
) -> tuple[int, list[str]]:
    """Return the exit code that the watchdog ends the process with, and what it reported."""
    reported: list[str] = []
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Ended

    watch.on_hang = reported.append
    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda *_: None)
    with pytest.raises(Ended):
        watch._run()
    return codes[0], reported


def test_a_save_without_progress_is_a_hang_while_training_continues(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimulatedClock(monkeypatch)
    timer = PhaseTimer()
    clock.on_sleep = timer.touch
    watch = Watchdog(trial, 1, RANK_0, timer, 30.0, save_progress=lambda: 1.0)
    code, reported = ended_by_watchdog(trial, monkeypatch, watch)
    assert code == ExitCode.HANG
    assert "the save makes no progress for 30 s" in reported[0]


@pytest.mark.parametrize("phase", ["init", "compile", "data", "train", "checkpoint", "probe"])
def test_a_phase_may_last_while_it_makes_progress(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """One limit holds in every phase, also in the first one of its kind, and after a long one."""
    clock = SimulatedClock(monkeypatch)
    timer = PhaseTimer()
    timer.phase = phase

    def progress() -> None:
        if clock.now < 3600.0 and clock.looks % 50 == 0:
            timer.touch()

    clock.on_sleep = progress
    watch = Watchdog(trial, 1, RANK_0, timer, 30.0)
    code, reported = ended_by_watchdog(trial, monkeypatch, watch)
    assert code == ExitCode.HANG
    assert f"30 s without progress in phase '{phase}'" in reported[0]
    assert 3600.0 < clock.now < 3640.0


def test_a_suspension_of_the_process_is_no_hang(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP for an hour, then SIGCONT: only the seconds in which the process ran count."""
    clock = SimulatedClock(monkeypatch)
    watch = Watchdog(trial, 1, RANK_0, PhaseTimer(), 30.0)
    clock.pauses = {2: 3600.0, 20: 3600.0}
    _, reported = ended_by_watchdog(trial, monkeypatch, watch)
    assert "30 s without progress in phase 'init'" in reported[0]
    assert 7200.0 + 25.0 < clock.now < 7200.0 + 40.0


def test_a_rank_that_waits_for_others_after_done_ends(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed look at DONE.json does not end the watchdog's thread."""
    write_json(trial.done, {"step": 12})
    clock = PhaseTimer()
    answers = iter([OSError(errno.ESTALE, "stale"), True])

    def exists(path: Path) -> bool:
        if path.name != "DONE.json":
            return False
        found = next(answers)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(Path, "exists", exists)
    monkeypatch.setattr(watchdog, "AFTER_DONE_SECONDS", 0.0)
    watch = Watchdog(trial, 1, RANK_0, clock, 30.0)
    with clock("checkpoint"):
        code, reported = ended_by_watchdog(trial, monkeypatch, watch)
    assert code == ExitCode.DONE
    assert not reported
