"""Whatever happens to its attempts, a trial ends with the bits of an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable

import chaos
import pytest
from attempts import assert_same_bits


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_random_faults_change_not_one_bit(launch: Callable, new_trial: Callable, chaos_faults: int) -> None:
    """Signals, kills, damaged checkpoints, full disks and hangs in random order: the final weights, moments and the
    settled history equal the clean trial's. Nine faults by default; `make chaos N=50` draws more, five a trial."""
    clean = new_trial("clean", **chaos.OVERRIDES)
    assert launch(clean).wait() == [0, 0]
    trials = max(1, chaos_faults // 5) if chaos_faults > 9 else 1
    for seed in range(trials):
        tormented = new_trial(f"seed{seed}", **chaos.OVERRIDES)
        tally = chaos.torment(tormented, launch, seed, -(-chaos_faults // trials))
        assert_same_bits(clean, tormented)
        print(tally.line(), "- bit-identical")
