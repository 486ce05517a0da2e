"""Whatever ends an attempt, the trial ends with the bits of an undisturbed one."""

from __future__ import annotations

import signal
from collections.abc import Callable

from support.attempts import assert_same_bits, history, steps_of, wait_for_step

from jepa_cluster.errors import ExitCode
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.spool import read

STEPS = {"optim.steps": 40}
FREQUENT = {"runtime.checkpoint_minutes": 0.004, **STEPS}


def test_killing_all_ranks_and_resuming_gives_the_same_bits(
    launch: Callable, new_trial: Callable, trained: Callable
) -> None:
    """After two kill -9, weights, moments and metrics equal those of an undisturbed trial."""
    alone = trained(**STEPS)
    killed = new_trial("killed", **FREQUENT)
    for step in (13, 29):
        ranks = launch(killed)
        wait_for_step(killed, step)
        ranks.kill(signal.SIGKILL)
        assert ranks.wait() == [-9, -9]
    assert killed.committed(), "no checkpoint before the kills: the test would show nothing"
    assert launch(killed).wait() == [0, 0]
    assert_same_bits(alone, killed)
    assert steps_of(alone) == list(range(41))


def test_a_signal_leads_to_a_checkpoint_of_that_very_step(
    launch: Callable, new_trial: Callable, trained: Callable
) -> None:
    """Exit code 75, no step lost; the next attempt resumes there, to the same bits."""
    alone = trained(**STEPS)
    stopped = new_trial("stopped", **STEPS)
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
    log = (stopped.logs(2) / "rank0.err").read_text()
    second = stopped.attempts()[1]
    assert f"world 2, cpu: from step {second['start_step']} to 40" in log
    assert f"preempted at step {second['end_step']}" in log
    assert "with the checkpoint of step" in log
    assert not (stopped.logs(2) / "rank1.err").read_text()


def test_one_lost_rank_ends_the_others_and_the_trial_resumes(
    launch: Callable, new_trial: Callable
) -> None:
    """The other rank records which rank was lost, and the trial may run again."""
    trial = new_trial("one", **FREQUENT)
    ranks = launch(trial)
    wait_for_step(trial, 8)
    ranks.kill(signal.SIGKILL, (1,))
    assert ranks.wait() == [ExitCode.HANG, -9]
    assert trial.attempts()[-1]["cause"] == "lost"
    assert not trial.failed.exists()
    assert launch(trial).wait() == [0, 0]
    done = read_json(trial.done)
    assert done is not None
    assert done["step"] == 40
    assert "probe/class_top1" in done["metrics"]


def test_the_stop_file_stops_the_trial_until_it_is_removed(
    launch: Callable, new_trial: Callable
) -> None:
    """The file STOP does what a signal does, with an exit code of its own."""
    trial = new_trial("stop", **STEPS)
    ranks = launch(trial)
    wait_for_step(trial, 3)
    trial.stop.touch()
    assert ranks.wait() == [ExitCode.STOPPED] * 2
    assert trial.attempts()[-1]["cause"] == "stopped"
    assert trial.committed()
    trial.stop.unlink()
    assert launch(trial).wait() == [0, 0]


def test_a_signal_during_the_last_probe_does_not_lose_its_row(
    launch: Callable, new_trial: Callable
) -> None:
    """The weights of the last step are saved, its row is in the manifest until the next attempt."""
    trial = new_trial("probe", **{"optim.steps": 6})
    ranks = launch(trial)
    wait_for_step(trial, 5)
    ranks.kill(signal.SIGTERM)
    codes = ranks.wait()
    if codes == [ExitCode.PREEMPTED] * 2:
        assert launch(trial).wait() == [0, 0]
    assert steps_of(trial) == list(range(7))
    assert "probe/class_top1" in history(trial)[-1][1]
