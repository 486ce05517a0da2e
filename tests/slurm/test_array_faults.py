"""One array, a fate for each trial, stubs in place of the trainer: what became of each, and what we say of it.

The faults are made in scenarios.array_faults, on a private Slurm, while the other tests here run.
"""

from support.login_node import causes, every_step_once
from support.slurm_scenarios import HOLD, ArrayFaults

from jepa_cluster.trial import spool


def test_a_neighbour_of_requeued_and_cancelled_trials_is_left_alone(array_faults: ArrayFaults) -> None:
    """One attempt, although the array's other tasks were requeued and the controller restarted in mid-sweep."""
    calm = array_faults.trials["calm"]
    assert causes(calm) == ["done"] and every_step_once(calm), array_faults.login.evidence()
    assert array_faults.status["calm"]["state"] == "done"


def test_variables_that_leaked_from_an_outer_allocation_reach_no_job(array_faults: ArrayFaults) -> None:
    """`jepa submit` ran with SLURM_*, SBATCH_*, RANK, MASTER_ADDR and JEPA_LAUNCH set to what would ruin each job."""
    for record in array_faults.trials["calm"].attempts():
        assert (record["world"], record["launch"], record["job_partition"]) == (1, f"{record['job']}.0", "low")


def test_usr2_saves_and_comes_back_where_it_stopped(array_faults: ArrayFaults) -> None:
    """The signal that Slurm sends ahead of the limit, to two tasks of an array: each is requeued alone."""
    for name in ("usr2", "again"):
        trial = array_faults.trials[name]
        assert causes(trial) == ["preempted", "done"] and every_step_once(trial), array_faults.login.evidence()
        rows = spool.read(trial).rows
        assert [row.step for row in rows if row.attempt == 1 and row.step] == list(range(1, HOLD + 1))
        assert {row.attempt for row in rows} == {1, 2}, "the second attempt went on where the first ended"


def test_an_administrators_requeue_comes_back(array_faults: ArrayFaults) -> None:
    """`scontrol requeue` of one task: TERM, and again from what it saved."""
    trial = array_faults.trials["requeued"]
    assert len(causes(trial)) == 2 and causes(trial)[-1] == "done" and every_step_once(trial), (
        array_faults.login.evidence()
    )


def test_scancel_of_a_running_index_stays_cancelled(array_faults: ArrayFaults) -> None:
    """One attempt, nothing in the queue, and submitting again leaves it alone."""
    trial = array_faults.trials["cancelled"]
    assert not trial.done.exists() and len(trial.attempts()) == 1, array_faults.login.evidence()
    assert (
        array_faults.status["cancelled"]["state"] == "stopped"
        and "jepa resume" in array_faults.status["cancelled"]["note"]
    )


def test_scancel_of_a_pending_index_stays_cancelled(array_faults: ArrayFaults) -> None:
    """It never began, and without accounting only slurmctld's memory knows why."""
    assert not array_faults.trials["pending"].attempts()
    assert (
        array_faults.status["pending"]["state"] == "stopped" and "jepa resume" in array_faults.status["pending"]["note"]
    )


def test_scancel_racing_a_requeue_stays_cancelled(array_faults: ArrayFaults) -> None:
    """USR2, which makes the task requeue itself, and scancel at the same moment: no resurrection."""
    trial = array_faults.trials["racing"]
    assert not trial.done.exists() and len(trial.attempts()) == 1, array_faults.login.evidence()
    assert array_faults.status["racing"]["state"] == "stopped"


def test_jepa_cancel_saves_first_and_stays_stopped(array_faults: ArrayFaults) -> None:
    """The STOP file, seen by the running trial."""
    trial = array_faults.trials["stopped"]
    assert causes(trial) == ["stopped"] and trial.committed() == [HOLD], array_faults.login.evidence()
    assert array_faults.status["stopped"]["state"] == "stopped"


def test_a_user_error_is_not_tried_again(array_faults: ArrayFaults) -> None:
    """One attempt; `why` shows the error and the last lines of the log."""
    trial, told = array_faults.trials["error"], array_faults.why["error"]
    assert causes(trial) == ["error"] and "a bug of the user's" in trial.failed.read_text()
    assert told["cause"] == "error" and told["rule"] == "not run again by itself"
    assert any("a bug of the user's" in line for line in told["log"]) and "jepa retry array_faults" in told["hint"]


def test_a_full_gpu_is_told_from_a_bug_and_the_next_try_halves_the_micro_batch(array_faults: ArrayFaults) -> None:
    """The words that torch uses; the global batch, and with it the trial, stays the same."""
    trial = array_faults.trials["gpu_oom"]
    config = trial.read_config()
    assert len(causes(trial)) == 2 and causes(trial)[-1] == "done", array_faults.login.evidence()
    assert config.runtime.micro_batch == config.recipe.optim.batch // 2
    assert "CUDA out of memory" in trial.attempts()[0]["error"]


def test_a_full_machine_is_told_from_a_bug(array_faults: ArrayFaults) -> None:
    """A real MemoryError, under a real limit."""
    assert causes(array_faults.trials["host_oom"])[0] is not None
    assert array_faults.why["host_oom"]["cause"] == "host_oom" and "workers" in array_faults.why["host_oom"]["hint"]


def test_a_hang_in_a_collective_is_ended_by_the_watchdog_and_tried_again(array_faults: ArrayFaults) -> None:
    """A rank waits for one that never comes; the task requeues itself, and the record says where it stood."""
    trial = array_faults.trials["hang"]
    assert causes(trial) == ["hang", "done"] and every_step_once(trial), array_faults.login.evidence()
    assert "in phase 'train'" in trial.attempts()[0]["error"]
