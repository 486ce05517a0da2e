"""Hydra's own command line on a real Slurm: its launcher plugin, our trial directories."""

from collections.abc import Callable


def test_a_multirun_writes_trial_directories_resumes_and_reports_failures(
    scenario: Callable[[str], object],
) -> None:
    """After `-m hydra/launcher=slurm seed=0,1,2` a sweep of these settings finds them done."""
    scenario("a_multirun_writes_trial_directories_resumes_and_reports_failures")
