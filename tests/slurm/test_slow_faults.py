"""Faults that Slurm notices late; the modules *_scenarios.py of tests/support make them.

The scenarios run beside the other tests.
"""

from collections.abc import Callable

import pytest

Scenario = Callable[[str], object]


def test_a_trial_longer_than_its_time_limit_is_requeued_and_resumes(scenario: Scenario) -> None:
    """USR2 before the limit of one minute, checkpoint, requeue, done in the next allocation."""
    scenario("a_trial_longer_than_its_time_limit_is_requeued_and_resumes")


def test_with_accounting_a_power_cut_costs_only_the_unsaved_steps(scenario: Scenario) -> None:
    """The node of rank 0 loses power; Slurm notices and requeues; the trial ends well."""
    scenario("with_accounting_a_power_cut_costs_only_the_unsaved_steps")


def test_a_frozen_node_is_replaced_and_does_no_harm_when_it_thaws(scenario: Scenario) -> None:
    """The node is frozen and thaws while the next attempt runs: the fence holds."""
    scenario("a_frozen_node_is_replaced_and_does_no_harm_when_it_thaws")


def test_slurmd_alone_dies_and_the_trial_is_neither_lost_nor_doubled(scenario: Scenario) -> None:
    """The tasks continue unknown to Slurm, which starts the job again on the other node."""
    scenario("slurmd_alone_dies_and_the_trial_is_neither_lost_nor_doubled")


def test_a_node_that_breaks_its_trials_is_left_out_when_they_run_again(scenario: Scenario) -> None:
    """An ECC error of n1: each job runs again without n1, and so do later submissions."""
    scenario("a_node_that_breaks_its_trials_is_left_out_when_they_run_again")


def test_a_node_that_fails_the_gpu_test_makes_no_attempt(scenario: Scenario) -> None:
    """The GPU of n1 is broken: the job runs again without n1."""
    scenario("a_node_that_fails_the_gpu_test_makes_no_attempt")


def test_a_trial_saved_while_the_controller_was_down_is_requeued_later(
    scenario: Scenario,
) -> None:
    """USR2 while slurmctld is down: `jepa status` reports it, and nothing is lost."""
    scenario("a_trial_saved_while_the_controller_was_down_is_requeued_later")


def test_with_accounting_a_cancelled_trial_stays_cancelled_until_resume(
    scenario: Scenario,
) -> None:
    """scancel of a running and of a pending index, with slurmdbd and without it.

    Both are stopped until resume.
    """
    scenario("with_accounting_a_cancelled_trial_stays_cancelled_until_resume")


def test_requeue_is_disabled_and_the_trial_resumes_nevertheless(scenario: Scenario) -> None:
    """JobRequeue=0, which our jobs override; then a job whose requeue is forbidden."""
    scenario("requeue_is_disabled_and_the_trial_resumes_nevertheless")


def test_preemption_by_term_alone_saves_and_resumes(scenario: Scenario) -> None:
    """A default cluster sends TERM, waits for the grace period, sends KILL."""
    scenario("preemption_by_term_alone_saves_and_resumes")


def test_preemption_that_sends_the_user_signal_first_saves_and_resumes(
    scenario: Scenario,
) -> None:
    """A cluster with preempt_send_user_signal sends USR2 first."""
    scenario("preemption_that_sends_the_user_signal_first_saves_and_resumes")


@pytest.mark.slow
def test_with_accounting_a_preemption_that_cancels_its_job_leads_to_a_chained_job(
    scenario: Scenario,
) -> None:
    """PreemptMode=CANCEL without a grace time: Slurm has ended the job when it sends TERM."""
    scenario("with_accounting_a_preemption_that_cancels_its_job_leads_to_a_chained_job")


@pytest.mark.slow
def test_what_slurm_has_forgotten_runs_again_unless_it_was_cancelled(scenario: Scenario) -> None:
    """A killed trial, and one that was cancelled while it waited, after MinJobAge."""
    scenario("what_slurm_has_forgotten_runs_again_unless_it_was_cancelled")


@pytest.mark.slow
def test_a_resumed_trial_that_is_requeued_and_lost_is_interrupted(scenario: Scenario) -> None:
    """The older record of the trial says that it was cancelled; the newest record decides."""
    scenario("a_resumed_trial_that_is_requeued_and_lost_is_interrupted")


@pytest.mark.slow
def test_a_preemption_that_suspends_a_trial_ends_no_attempt(scenario: Scenario) -> None:
    """SUSPEND and GANG: it counts as running, and is not started a second time."""
    scenario("a_preemption_that_suspends_a_trial_ends_no_attempt")


@pytest.mark.chaos
def test_a_sweep_under_random_faults_ends_complete(scenario: Scenario) -> None:
    """Signals, requeues, kill -9, power cuts, restarts of the controller.

    Nine faults by default; `make chaos N=50` draws more.
    """
    scenario("a_sweep_under_random_faults_ends_complete")
