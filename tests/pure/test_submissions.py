"""The order of sbatch calls and what each array waits for, without a Slurm."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_trials import config

from jepa_cluster.errors import LaunchError, SubmitLimit
from jepa_cluster.launch.cluster.cost import CostEstimate
from jepa_cluster.launch.cluster.profile import Profile
from jepa_cluster.launch.scheduler import array_records, facts
from jepa_cluster.launch.scheduler.facts import StatusSnapshot
from jepa_cluster.launch.submit import canary, sbatch, submit
from jepa_cluster.launch.submit.plan import Plan, check
from jepa_cluster.launch.submit.sbatch import Submission
from jepa_cluster.launch.submit.submissions import submit_in_order
from jepa_cluster.sweep.points import Limits, Sweep
from jepa_cluster.sweep.reconcile import reconcile
from jepa_cluster.sweep.resolve import Trial, new_name
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.status import State, TrialStatus

NO_LIMITS = Limits()


def trials(minutes: Iterable[int], trunk: bool = False) -> list[Trial]:
    """Make a trial per time limit, so each is a class. trunk: the others branch from the first."""
    found: list[Trial] = []
    for seed, limit in enumerate(minutes):
        made = config("vit_a", (0.15, 0.2), seed, 60)
        if trunk and found:
            runtime = replace(made.runtime, fork_from=found[0].name)
            made = replace(made, runtime=runtime)
        found.append(Trial(new_name({}, seed, made), {}, seed, made, limit))
    return found


def make_plan(
    root: Path,
    sweep_trials: list[Trial],
    limits: Limits = NO_LIMITS,
    states: dict[str, State] | None = None,
) -> Plan:
    by_name = {trial.name: trial for trial in sweep_trials}
    statuses = dict.fromkeys(by_name, TrialStatus("new"))
    for name, state in (states or {}).items():
        statuses[name] = TrialStatus(state)
    snapshot = StatusSnapshot(statuses)
    sweep = Sweep("s", question="Q", limits=limits)
    estimates = dict.fromkeys(by_name, CostEstimate(1.0, 0.1, "test"))
    actions = reconcile(by_name, snapshot.states)
    return Plan(Root(root), sweep, Profile("slurm"), by_name, snapshot, actions, estimates)


def submitted(plan: Plan, canaries: dict[str, str]) -> list[Submission]:
    """Return what is submitted, in order; the jobs are 1, 2, 3, ..."""
    found: list[Submission] = []

    def submit(submission: Submission) -> str:
        found.append(submission)
        return str(len(found))

    submit_in_order(plan, 1000, canaries, submit)
    return found


def canary_in_state(monkeypatch: pytest.MonkeyPatch, state: State, job: str) -> None:
    status = TrialStatus(state, job=job)
    snapshot = lambda root, names: StatusSnapshot(dict.fromkeys(names, status))  # noqa: E731
    monkeypatch.setattr(facts, "query_status", snapshot)


def test_each_canary_is_submitted_before_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    canary_in_state(monkeypatch, "new", "")
    plan = make_plan(tmp_path, trials([30, 30, 90]))
    small, small_trials, large, large_trials = submitted(
        plan, {"A": "canary.s.A.0.x", "B": "canary.s.B.0.y"}
    )
    assert small.title == "the canary of class A, 1 trial"
    assert small_trials.title == "class A, 2 trials"
    assert small.is_canary
    assert not small.dependency
    assert large.array.cls.minutes == canary.MAX_MINUTES
    assert small_trials.dependency == "afterok:1"
    assert large_trials.dependency == "afterok:3"
    assert large_trials.canary == "canary.s.B.0.y"
    assert large_trials.array.cls.minutes == 90


@pytest.mark.parametrize("state", ["queued", "requeued", "running"])
def test_a_canary_in_progress_is_not_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State
):
    canary_in_state(monkeypatch, state, "77")
    (array,) = submitted(make_plan(tmp_path, trials([30])), {"A": "canary.s.A.0.x"})
    assert array.dependency == "afterok:77"


@pytest.mark.parametrize("state", ["interrupted", "stopped", "failed"])
def test_no_class_depends_on_the_job_of_a_canary_that_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State
):
    """Slurm would never start it: a new job of the canary comes first."""
    canary_in_state(monkeypatch, state, "77")
    first, array = submitted(make_plan(tmp_path, trials([30])), {"A": "canary.s.A.0.x"})
    assert first.is_canary
    assert array.dependency == "afterok:1"


def test_an_array_for_which_the_cap_has_no_room_waits_for_all_before_it(tmp_path: Path):
    """One GPU: the first class runs, the second follows it, the third follows both."""
    plan = make_plan(tmp_path, trials([30, 60, 90]), Limits(gpus_in_flight=1))
    assert [one.dependency for one in submitted(plan, {})] == ["", "afterany:1", "afterany:1:2"]
    with pytest.raises(LaunchError, match="never fits into 0 in flight"):
        check(replace(plan, sweep=replace(plan.sweep, limits=Limits(gpus_in_flight=0))))


@pytest.mark.parametrize(("room", "sizes"), [(9, [9]), (5, [4, 1]), (3, [2, 1]), (0, [])])
def test_an_array_is_halved_until_the_users_room_in_the_queue_is_full(
    tmp_path: Path, room: int, sizes: list[int]
):
    """The parts together run no more at a time than the array would."""
    plan = make_plan(tmp_path, trials([30] * 9), Limits(gpus_in_flight=6))
    found: list[Submission] = []

    def submit_limited(submission: Submission) -> str:
        used = sum(len(each.array.trials) for each in found)
        if used + len(submission.array.trials) > room:
            raise SubmitLimit("AssocMaxSubmitJobLimit")
        found.append(submission)
        return str(len(found))

    if room < 9:
        with pytest.raises(SubmitLimit):
            submit_in_order(plan, 1000, {}, submit_limited)
    else:
        submit_in_order(plan, 1000, {}, submit_limited)
    assert [len(each.array.trials) for each in found] == sizes
    names = [name for each in found for name in each.array.trials]
    assert names == list(plan.trials)[: len(names)]
    assert sum(each.array.parallel for each in found) <= 6
    limited = plan.actions.limited_to(names)
    assert (*limited.start, *limited.trials("wait")) == plan.actions.start


def test_branches_are_held_only_behind_a_trunk_that_starts_or_is_in_progress(tmp_path: Path):
    """Behind one that failed they start at once, from step 0."""
    forked = trials([30, 30], trunk=True)
    trunk, branch = (trial.name for trial in forked)
    arrays = submitted(make_plan(tmp_path, forked), {})
    assert [dict(one.branches) for one in arrays] == [{}, {branch: (trunk, forked[1].begins)}]
    (running,) = submitted(make_plan(tmp_path, forked, states={trunk: "running"}), {})
    assert list(running.branches) == [branch]
    (alone,) = submitted(make_plan(tmp_path, forked, states={trunk: "failed"}), {})
    assert not alone.branches


def test_the_record_of_a_canary_names_its_class_with_its_own_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its job is shorter than those of its class."""
    monkeypatch.setattr(sbatch, "submit", lambda *_: "7")
    plan = make_plan(tmp_path, trials([720]))
    folder = plan.root.sweep("s")
    for part in (folder.intents, folder.arrays):
        part.mkdir(parents=True)
    canaries = canary.required(plan, "code")

    def submit_one(submission: Submission) -> str:
        return submit._submit_one(plan, "code", submission)  # pyright: ignore[reportPrivateUsage]

    submit_in_order(plan, 1000, canaries, submit_one)
    records = array_records.read(plan.root, "s")
    assert [record["class"] for record in records] == ["A", "A"]
    assert sorted(record["minutes"] for record in records) == [60, 720]
