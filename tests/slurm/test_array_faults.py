"""One array of stub trials with a fault each: their attempts, `jepa status` and `jepa why`.

The faults are made in slurm_scenarios.array_faults, on a private Slurm, while the other tests here
run.
"""

from support.login_node import HOLD, assert_ended, causes
from support.slurm_scenarios import ArrayFaults

from jepa_cluster.trial import spool


def test_a_neighbour_of_requeued_and_cancelled_trials_is_left_alone(
    array_faults: ArrayFaults,
) -> None:
    """One attempt, although other tasks were requeued and the controller restarted."""
    calm = array_faults.trials["calm"]
    assert_ended(array_faults.login, calm, ["done"])
    assert array_faults.status["calm"]["state"] == "done"


def test_variables_that_leaked_from_an_outer_allocation_reach_no_job(
    array_faults: ArrayFaults,
) -> None:
    """`jepa submit` ran with SLURM_*, SBATCH_*, RANK, MASTER_ADDR and JEPA_LAUNCH set.

    Each of these would break a job that inherited it.
    """
    for record in array_faults.trials["calm"].attempts():
        assert record["world"] == 1
        assert record["launch"] == f"{record['job']}.0"
        assert record["job_partition"] == "low"


def test_usr2_saves_and_the_trial_resumes_there(array_faults: ArrayFaults) -> None:
    """Slurm's signal before the limit, sent to two tasks of an array: each is requeued alone."""
    for name in ("usr2", "again"):
        trial = array_faults.trials[name]
        assert_ended(array_faults.login, trial, ["preempted", "done"])
        rows = spool.read(trial).rows
        first = [row.step for row in rows if row.attempt == 1 and row.step]
        assert first == list(range(1, HOLD + 1))
        assert {row.attempt for row in rows} == {1, 2}


def test_an_administrators_requeue_resumes_the_trial(array_faults: ArrayFaults) -> None:
    """`scontrol requeue` of one task sends TERM; the next attempt resumes from what it saved."""
    trial = array_faults.trials["requeued"]
    first = causes(trial)[0]
    assert_ended(array_faults.login, trial, [first, "done"])


def assert_stays_cancelled(array_faults: ArrayFaults, name: str) -> None:
    """The trial has one attempt, is not done, and is shown as stopped."""
    trial = array_faults.trials[name]
    assert not trial.done.exists(), array_faults.login.evidence()
    assert len(trial.attempts()) == 1, array_faults.login.evidence()
    assert array_faults.status[name]["state"] == "stopped"


def test_scancel_of_a_running_index_stays_cancelled(array_faults: ArrayFaults) -> None:
    """One attempt, nothing in the queue, and submitting again leaves it alone."""
    assert_stays_cancelled(array_faults, "cancelled")
    assert "jepa resume" in array_faults.status["cancelled"]["note"]


def test_scancel_of_a_pending_index_stays_cancelled(array_faults: ArrayFaults) -> None:
    """It never ran, and without accounting only slurmctld remembers the reason."""
    assert not array_faults.trials["pending"].attempts()
    assert array_faults.status["pending"]["state"] == "stopped"
    assert "jepa resume" in array_faults.status["pending"]["note"]


def test_scancel_racing_a_requeue_stays_cancelled(array_faults: ArrayFaults) -> None:
    """USR2 makes the task requeue itself; scancel at the same moment keeps it cancelled."""
    assert_stays_cancelled(array_faults, "racing")


def test_jepa_cancel_saves_first_and_stays_stopped(array_faults: ArrayFaults) -> None:
    """The running trial reads the STOP file."""
    trial = array_faults.trials["stopped"]
    assert causes(trial) == ["stopped"], array_faults.login.evidence()
    assert trial.committed() == [HOLD], array_faults.login.evidence()
    assert array_faults.status["stopped"]["state"] == "stopped"


def test_a_user_error_is_not_retried(array_faults: ArrayFaults) -> None:
    """One attempt; `why` shows the error and the last lines of the log."""
    trial = array_faults.trials["error"]
    why = array_faults.why["error"]
    assert causes(trial) == ["error"]
    assert "a bug of the user's" in trial.failed.read_text()
    assert why["cause"] == "error"
    assert why["rule"] == "not run again by itself"
    assert "a bug of the user's" in "\n".join(why["log"])
    assert "jepa retry array_faults" in why["hint"]


def test_a_full_gpu_is_recognised_and_halves_the_micro_batch(
    array_faults: ArrayFaults,
) -> None:
    """The error is torch's; the global batch, and with it the trial, stays the same."""
    trial = array_faults.trials["gpu_oom"]
    config = trial.read_config()
    assert len(causes(trial)) == 2, array_faults.login.evidence()
    assert causes(trial)[1] == "done", array_faults.login.evidence()
    assert config.runtime.micro_batch == config.recipe.optim.batch // 2
    assert "CUDA out of memory" in trial.attempts()[0]["error"]


def test_a_full_machine_is_recognised(array_faults: ArrayFaults) -> None:
    """A real MemoryError, under a real limit."""
    assert causes(array_faults.trials["host_oom"])[0] is not None
    why = array_faults.why["host_oom"]
    assert why["cause"] == "host_oom"
    assert "workers" in why["hint"]


def test_a_hang_in_a_collective_is_ended_by_the_watchdog_and_retried(
    array_faults: ArrayFaults,
) -> None:
    """The task requeues itself, and the record names the phase in which it hung."""
    trial = array_faults.trials["hang"]
    assert_ended(array_faults.login, trial, ["hang", "done"])
    assert "in phase 'train'" in trial.attempts()[0]["error"]
