"""Whatever ends an attempt, the trial ends with the bits of an undisturbed one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from support.attempts import assert_same_bits, history

from jepa_cluster.errors import ExitCode
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.spool import read

STEPS = {"optim.steps": 40}
FREQUENT = {"runtime.checkpoint_minutes": 0.004, **STEPS}


def wait_for_step(trial: TrialDir, step: int, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        rows = read(trial).rows
        if rows and rows[-1].step >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in {seconds} s")


def test_killing_all_ranks_and_resuming_gives_the_same_bits(
    launch: Callable, new_trial: Callable, trained: Callable
) -> None:
    """kill -9 in the middle, then again: weights, moments and metrics equal those of a trial left alone."""
    alone, killed = trained(**STEPS), new_trial("killed", **FREQUENT)
    for step in (13, 29):
        ranks = launch(killed)
        wait_for_step(killed, step)
        ranks.kill(signal.SIGKILL)
        assert ranks.wait() == [-9, -9]
    assert killed.committed(), "no checkpoint before the kills: the test would show nothing"
    assert launch(killed).wait() == [0, 0]
    assert_same_bits(alone, killed)
    assert [s for s, _ in history(alone)] == list(range(41))


def test_a_signal_leads_to_a_checkpoint_of_that_very_step(
    launch: Callable, new_trial: Callable, trained: Callable
) -> None:
    """TERM and USR2 alike: exit code 75, no step lost, and the next attempt goes on from there to the same bits."""
    alone, stopped = trained(**STEPS), new_trial("stopped", **STEPS)
    for number, step in ((signal.SIGTERM, 10), (signal.SIGUSR2, 22)):
        ranks = launch(stopped)
        wait_for_step(stopped, step)
        ranks.kill(number)
        assert ranks.wait() == [ExitCode.PREEMPTED] * 2
        record = stopped.attempts()[-1]
        assert record["cause"] == "preempted"
        assert record["end_step"] == stopped.committed()[-1] == read(stopped).settled
    assert launch(stopped).wait() == [0, 0]
    assert_same_bits(alone, stopped)
    told = (stopped.logs(2) / "rank0.err").read_text()
    first, last = stopped.attempts()[1]["start_step"], stopped.attempts()[1]["end_step"]
    assert f"world 2, cpu: from step {first} to 40" in told and f"preempted at step {last}" in told
    assert "with the checkpoint of step" in told and not (stopped.logs(2) / "rank1.err").read_text()


def test_one_lost_rank_ends_the_others_and_the_trial_goes_on(launch: Callable, new_trial: Callable) -> None:
    """The survivor says which rank went missing, blames nobody else, and may be tried again."""
    trial = new_trial("one", **FREQUENT)
    ranks = launch(trial)
    wait_for_step(trial, 8)
    ranks.kill(signal.SIGKILL, (1,))
    assert ranks.wait() == [ExitCode.HANG, -9]
    assert trial.attempts()[-1]["cause"] == "lost"
    assert not trial.failed.exists()
    assert launch(trial).wait() == [0, 0]
    done = read_json(trial.done)
    assert done is not None and done["step"] == 40 and "probe/class_top1" in done["metrics"]


def test_the_stop_file_stops_and_its_removal_lets_go_on(launch: Callable, new_trial: Callable) -> None:
    """A user's `touch STOP` does what a signal does, with an exit code of its own."""
    trial = new_trial("stop", **STEPS)
    ranks = launch(trial)
    wait_for_step(trial, 3)
    trial.stop.touch()
    assert ranks.wait() == [ExitCode.STOPPED] * 2
    assert trial.attempts()[-1]["cause"] == "stopped" and trial.committed()
    trial.stop.unlink()
    assert launch(trial).wait() == [0, 0]


def test_a_signal_during_the_last_probe_loses_neither_the_row_nor_its_settling(
    launch: Callable, new_trial: Callable
) -> None:
    """The weights are saved at the last step, the row waits in the manifest; the next attempt makes it whole."""
    trial = new_trial("probe", **{"optim.steps": 6})
    ranks = launch(trial)
    wait_for_step(trial, 5)
    ranks.kill(signal.SIGTERM)
    codes = ranks.wait()
    if codes == [ExitCode.PREEMPTED] * 2:
        assert launch(trial).wait() == [0, 0]
    assert [s for s, _ in history(trial)] == list(range(7))
    assert "probe/class_top1" in history(trial)[-1][1]
