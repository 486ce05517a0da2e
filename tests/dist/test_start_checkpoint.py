"""A cool-down branch that begins from its trunk ends with the bits of one trained from step 0."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from support.attempts import assert_same_bits, history

from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import TrialDir

PLATEAU = {"optim.schedule": "wsd", "optim.cooldown_steps": 4, "optim.final_weight_decay": 0.04,
           "optim.final_momentum": 0.99}  # fmt: skip
TRUNK = {**PLATEAU, "optim.steps": 24, "runtime.milestones": [8]}
BRANCH = {**PLATEAU, "optim.steps": 12}


def test_a_forked_branch_has_the_bits_and_the_history_of_one_trained_from_zero(
    launch: Callable, new_trial: Callable
) -> None:
    """It makes 4 steps instead of 12; weights, moments, rows and running totals are those of a trial without a trunk.

    When the trunk's milestone does not verify, it makes all 12, to the same bits: the fork saves work, decides nothing.
    """
    alone, trunk = new_trial("alone", **BRANCH), new_trial(**TRUNK)
    assert launch(alone).wait() == [0, 0]
    assert launch(trunk).wait() == [0, 0]
    assert 8 in trunk.committed()
    branch = new_trial(**BRANCH, **{"runtime.fork_from": trunk.name})
    assert branch.name == alone.name and launch(branch).wait() == [0, 0]
    first = branch.attempts()[0]
    assert first["start_step"] == 8 and first["trunk"] == trunk.name
    assert_same_bits(alone, branch)
    assert [s for s, _ in history(branch)] == list(range(13))
    shared = [r.t for r in spool.read(trunk).rows if r.step <= 8]
    assert [r.t for r in spool.read(branch).rows][:9] == shared, "what the trunk wrote keeps its times"

    victim = max(trunk.checkpoint(8).glob("*.safetensors"), key=lambda p: p.stat().st_size)
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    victim.write_bytes(damaged)
    before = sorted(trunk.path.rglob("*"))
    shutil.rmtree(branch.path)
    branch = new_trial(**BRANCH, **{"runtime.fork_from": trunk.name})
    assert launch(branch).wait() == [0, 0]
    assert branch.attempts()[0]["start_step"] == 0 and "trunk" not in branch.attempts()[0]
    words = "".join(p.read_text() for p in branch.logs(1).glob("*.err"))
    assert "cannot be used" in words and sorted(trunk.path.rglob("*")) == before, "a trunk is not ours to mend"
    assert_same_bits(alone, branch)


@pytest.mark.parametrize("steps", [(), (8,)])
def test_rank_0_reports_every_commit_of_a_trial_with_milestones(new_trial: Callable, steps: tuple[int, ...]) -> None:
    """So that branches are released; a failure is tried again at the next commit. Other trials report nothing."""
    from jepa_cluster.training.checkpoint_policy import CheckpointPolicy
    from jepa_cluster.training.preemption import JobHooks

    calls: list[str] = []
    policy = CheckpointPolicy.__new__(CheckpointPolicy)
    policy.config = new_trial(**PLATEAU, **{"optim.steps": 24, "runtime.milestones": list(steps)}).read_config()
    policy.log = SimpleNamespace(commit=lambda manifest: calls.append("log"))
    policy.hooks = JobHooks(on_commit=lambda: calls.append("on_commit"))
    policy._after_commit(SimpleNamespace(step=8))
    assert calls == (["log", "on_commit"] if steps else ["log"])


def test_a_trunk_that_parts_before_the_cool_down_is_no_trunk(new_trial: Callable) -> None:
    """Another rate, another decay that moves, another seed; and steps that are no milestone."""
    from jepa_cluster.training.start_checkpoint import fork_steps

    trunk = new_trial(**TRUNK)
    for step in (4, 8, 20):
        trunk.checkpoint(step).mkdir()
    branch = new_trial("other", **BRANCH).read_config()
    assert fork_steps(trunk, branch) == [8]
    for change in ({"optim.lr": 2e-3}, {"optim.final_weight_decay": 0.05}, {"seed": 1}, {"optim.cooldown_steps": 5}):
        assert fork_steps(trunk, new_trial("x", **{**BRANCH, **change}).read_config()) == []
    assert fork_steps(TrialDir(trunk.path.with_name("nobody")), branch) == []
