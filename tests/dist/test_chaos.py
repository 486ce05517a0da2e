"""A trial ends with the bits of an undisturbed one, whatever fault its attempts meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support import chaos
from support.attempts import assert_same_bits


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_random_faults_change_no_bit(
    launch: Callable, new_trial: Callable, chaos_faults: int
) -> None:
    """The final weights, moments and settled history equal those of the clean trial.

    Faults: signals, kills, damaged checkpoints, full disks and hangs in random order, five by
    default. `make chaos N=50` draws more, five per trial, with further seeds until as many have
    struck.
    """
    clean = new_trial("clean", **chaos.OVERRIDES)
    assert launch(clean).wait() == [0, 0]
    each = min(chaos_faults, 5)
    tallies: list[chaos.Tally] = []
    remaining = chaos_faults
    while remaining > 0:
        seed = len(tallies)
        trial = new_trial(f"seed{seed}", **chaos.OVERRIDES)
        tally = chaos.run_with_faults(trial, launch, seed, min(each, remaining))
        assert_same_bits(clean, trial)
        print(tally.line(), flush=True)
        tallies.append(tally)
        remaining -= len(tally.faults)
    print(chaos.table(tallies))
