"""A cool-down branch that starts from its trunk ends with the bits of one trained from step 0."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.attempts import assert_same_bits, steps_of

from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import TrialDir

PLATEAU = {
    "optim.schedule": "wsd",
    "optim.cooldown_steps": 4,
    "optim.final_weight_decay": 0.04,
    "optim.final_momentum": 0.99,
}
TRUNK = {**PLATEAU, "optim.steps": 24, "runtime.milestones": [8]}
BRANCH = {**PLATEAU, "optim.steps": 12}


def test_a_forked_branch_has_the_bits_and_history_of_one_from_step_0(
    launch: Callable, new_trial: Callable
) -> None:
    """4 steps instead of 12 give the weights, moments, rows and totals of a trial without a trunk.

    When the trunk's milestone does not verify, the branch makes all 12 steps, to the same bits.
    """
    alone = new_trial("alone", **BRANCH)
    trunk = new_trial(**TRUNK)
    assert launch(alone).wait() == [0, 0]
    assert launch(trunk).wait() == [0, 0]
    assert 8 in trunk.committed()
    branch = new_trial(**BRANCH, **{"runtime.fork_from": trunk.name})
    assert branch.name == alone.name
    assert launch(branch).wait() == [0, 0]
    first = branch.attempts()[0]
    assert first["start_step"] == 8
    assert first["trunk"] == trunk.name
    assert_same_bits(alone, branch)
    assert steps_of(branch) == list(range(13))
    assert times_through(branch, 8) == times_through(trunk, 8)

    damage(trunk.checkpoint(8))
    before = sorted(trunk.path.rglob("*"))
    shutil.rmtree(branch.path)
    branch = new_trial(**BRANCH, **{"runtime.fork_from": trunk.name})
    assert launch(branch).wait() == [0, 0]
    assert branch.attempts()[0]["start_step"] == 0
    assert "trunk" not in branch.attempts()[0]
    logs = "".join(log.read_text() for log in branch.logs(1).glob("*.err"))
    assert "cannot be used" in logs
    assert sorted(trunk.path.rglob("*")) == before, "a branch changes nothing in its trunk"
    assert_same_bits(alone, branch)


def times_through(trial: TrialDir, step: int) -> list[float]:
    """When each row was logged, from step 0 to this one."""
    return [row.t for row in spool.read(trial).rows if row.step <= step]


def damage(folder: Path) -> None:
    """Flip a bit in the largest file of a checkpoint."""
    victim = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)


@pytest.mark.parametrize("steps", [(), (8,)])
def test_rank_0_reports_every_commit_of_a_trial_with_milestones(
    new_trial: Callable, steps: tuple[int, ...]
) -> None:
    """The reports release branches; other trials report nothing."""
    from jepa_cluster.training.checkpoint_policy import CheckpointPolicy
    from jepa_cluster.training.preemption import JobHooks

    calls: list[str] = []
    policy = CheckpointPolicy.__new__(CheckpointPolicy)
    overrides = {"optim.steps": 24, "runtime.milestones": list(steps)}
    policy.config = new_trial(**PLATEAU, **overrides).read_config()
    policy.log = SimpleNamespace(commit=lambda manifest, save_seconds: calls.append("log"))
    hooks = JobHooks(on_commit=lambda: calls.append("on_commit"))
    policy.exits = SimpleNamespace(hooks=hooks)
    policy._after_commit(SimpleNamespace(step=8))
    assert calls == ["log", "on_commit"][: 1 + len(steps)]


def test_a_trunk_that_parts_before_the_cool_down_is_no_trunk(new_trial: Callable) -> None:
    """Another rate, another decay that moves, another seed; and steps that are no milestone."""
    from jepa_cluster.training.start_checkpoint import fork_steps

    trunk = new_trial(**TRUNK)
    for step in (4, 8, 20):
        trunk.checkpoint(step).mkdir(parents=True)
    branch = new_trial("other", **BRANCH).read_config()
    assert fork_steps(trunk, branch) == [8]
    for change in (
        {"optim.lr": 2e-3},
        {"optim.final_weight_decay": 0.05},
        {"seed": 1},
        {"optim.cooldown_steps": 5},
    ):
        assert fork_steps(trunk, new_trial("x", **{**BRANCH, **change}).read_config()) == []
    assert fork_steps(TrialDir(trunk.path.with_name("nobody")), branch) == []
