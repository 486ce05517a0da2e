"""Hydra's own command line on a real Slurm: the launcher plugin as its users know it, our trial directories beneath."""

from collections.abc import Callable


def test_a_multirun_trains_into_trial_directories_resumes_after_a_requeue_and_fails_as_a_job(
    scenario: Callable[[str], object],
) -> None:
    """`-m hydra/launcher=slurm seed=0,1,2`; a sweep of the same settings then finds its trials done."""
    scenario("a_multirun_trains_into_trial_directories_resumes_after_a_requeue_and_fails_as_a_job")
