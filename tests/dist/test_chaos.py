"""Whatever happens to its attempts, a trial ends with the bits of an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support import chaos
from support.attempts import assert_same_bits


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_random_faults_change_not_one_bit(launch: Callable, new_trial: Callable, chaos_faults: int) -> None:
    """Signals, kills, damaged checkpoints, full disks and hangs in random order: the final weights, moments and the
    settled history equal the clean trial's. Nine faults by default; `make chaos N=50` draws more, five a trial, and
    goes on with further seeds until as many have struck."""
    clean = new_trial("clean", **chaos.OVERRIDES)
    assert launch(clean).wait() == [0, 0]
    each, tallies = 5 if chaos_faults > 9 else chaos_faults, list[chaos.Tally]()
    while (struck := sum(len(t.faults) for t in tallies)) < chaos_faults:
        seed = len(tallies)
        tormented = new_trial(f"seed{seed}", **chaos.OVERRIDES)
        tallies.append(chaos.torment(tormented, launch, seed, min(each, chaos_faults - struck)))
        assert_same_bits(clean, tormented)
        print(tallies[-1].line(), flush=True)
    print(chaos.table(tallies))
