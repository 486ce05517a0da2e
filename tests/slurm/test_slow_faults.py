"""Faults that take Slurm a while to notice. Their bodies are in scenarios.py and have run beside the other tests."""

from collections.abc import Callable

import pytest

Scenario = Callable[[str], object]


def test_a_trial_longer_than_its_time_limit_pauses_and_goes_on(scenario: Scenario) -> None:
    """USR2 ahead of the limit of one minute, checkpoint, requeue, done in the next allocation."""
    scenario("a_trial_longer_than_its_time_limit_pauses_and_goes_on")


def test_a_power_cut_costs_only_the_unsaved_steps(scenario: Scenario) -> None:
    """The node of rank 0 and of the batch script goes dark; Slurm notices and requeues; the trial ends well."""
    scenario("a_power_cut_costs_only_the_unsaved_steps")


def test_a_frozen_node_is_replaced_and_does_no_harm_when_it_thaws(scenario: Scenario) -> None:
    """The node hangs with the trial on it and comes back while the next attempt works: the fence holds."""
    scenario("a_frozen_node_is_replaced_and_does_no_harm_when_it_thaws")


def test_slurmd_alone_dies_and_the_trial_is_neither_lost_nor_doubled(scenario: Scenario) -> None:
    """The tasks run on behind Slurm's back while it gives the node up and starts the job again on the other one."""
    scenario("slurmd_alone_dies_and_the_trial_is_neither_lost_nor_doubled")


def test_a_node_that_breaks_its_trials_is_left_out_when_they_run_again(scenario: Scenario) -> None:
    """An ECC error on n1, whoever comes: each job comes back without n1, and so does what is submitted after two."""
    scenario("a_node_that_breaks_its_trials_is_left_out_when_they_run_again")


def test_a_trial_that_saved_while_the_controller_was_down_goes_back_to_the_queue_later(scenario: Scenario) -> None:
    """USR2 with nobody there to take the requeue; `jepa status` says that Slurm does not answer, and loses nothing."""
    scenario("a_trial_that_saved_while_the_controller_was_down_goes_back_to_the_queue_later")


def test_with_accounting_a_cancelled_trial_stays_cancelled_until_somebody_resumes_it(scenario: Scenario) -> None:
    """scancel of a running and of a pending index, with slurmdbd and without: stopped; taken up by resume."""
    scenario("with_accounting_a_cancelled_trial_stays_cancelled_until_somebody_resumes_it")


def test_requeue_is_disabled_and_the_trial_goes_on_all_the_same(scenario: Scenario) -> None:
    """JobRequeue=0, which our jobs overrule; then a job whose requeue an administrator forbade."""
    scenario("requeue_is_disabled_and_the_trial_goes_on_all_the_same")


def test_preemption_by_term_alone_saves_and_comes_back(scenario: Scenario) -> None:
    """A stock cluster: TERM, the grace period, KILL."""
    scenario("preemption_by_term_alone_saves_and_comes_back")


def test_preemption_that_sends_the_user_signal_first_saves_and_comes_back(scenario: Scenario) -> None:
    """A cluster with preempt_send_user_signal: USR2 first."""
    scenario("preemption_that_sends_the_user_signal_first_saves_and_comes_back")


@pytest.mark.chaos
def test_a_sweep_under_random_faults_ends_complete(scenario: Scenario) -> None:
    """Signals, requeues, kill -9, power cuts, a restarted controller; nine by default, `make chaos N=50` draws more."""
    scenario("a_sweep_under_random_faults_ends_complete")
