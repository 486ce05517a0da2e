"""Which failures are retried, how often, and with which micro-batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_trials import config

from jepa_cluster.config import TrialConfig
from jepa_cluster.launch.scheduler import retry_policy
from jepa_cluster.sweep.points import RETRIES
from jepa_cluster.training.dist_env import micro_batch
from jepa_cluster.trial import failures
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.failures import exhausted_budget
from jepa_cluster.trial.files import write_json

FULL = {
    "cause": "error",
    "error": "torch.OutOfMemoryError: CUDA out of memory",
    "ended": 2,
    "started": 1,
}
LOST: dict[str, Any] = {"started": 1, "job_id": "7"}  # the record of its end is missing


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    settings = config("vit_a", (0.15, 0.2), 0, 60)
    trial = Root(tmp_path).trial_of(settings)
    trial.create(settings)
    return trial


def mark_failed(
    trial: TrialDir,
    error: str,
) -> None:
    """Write the marker of a failed trial, as the rank with the error does."""
    write_json(trial.failed, {"cause": "error", "error": error})


def test_after_gpu_oom_the_micro_batch_is_halved(trial: TrialDir):
    """The recipe stays. A second rank with the same error does not halve it again."""
    before = trial.read_config()
    trial.claim(FULL)
    mark_failed(trial, FULL["error"])
    assert retry_policy.apply_retry(trial, RETRIES)
    mark_failed(trial, FULL["error"])
    assert retry_policy.apply_retry(trial, RETRIES)
    after = trial.read_config()
    assert after.runtime.micro_batch == before.recipe.optim.batch // 2
    assert after.id == before.id
    assert not trial.failed.exists()


def test_a_second_gpu_oom_exceeds_the_budget(trial: TrialDir):
    trial.claim(FULL)
    mark_failed(trial, FULL["error"])
    assert retry_policy.apply_retry(trial, RETRIES)
    trial.claim(FULL)
    mark_failed(trial, FULL["error"])
    assert not retry_policy.apply_retry(trial, RETRIES)
    assert trial.failed.exists()


@pytest.mark.parametrize("retries", [RETRIES, {**RETRIES, "oom": 0}])
def test_gpu_oom_before_a_step_is_done_halves_the_micro_batch_down_to_one(
    trial: TrialDir, retries: dict[str, int]
):
    """It uses no retry: at most one attempt per halving. Later ones count."""
    first_step = {**FULL, "start_step": 0, "end_step": 0}
    batch = trial.read_config().recipe.optim.batch
    sizes: list[int | None] = []
    for _ in range(20):
        trial.claim(first_step)
        mark_failed(trial, FULL["error"])
        if not retry_policy.apply_retry(trial, retries):
            break
        sizes.append(trial.read_config().runtime.micro_batch)
    assert sizes == [batch >> n for n in range(1, batch.bit_length())]
    assert sizes[-1] == 1
    assert trial.failed.exists()
    assert exhausted_budget(trial.attempts()[:-1], RETRIES)[0] == ""
    later = {**first_step, "end_step": 3, "halved": 1}
    assert exhausted_budget([later, later], RETRIES)[0]  # pyright: ignore[reportArgumentType]


def test_a_broken_node_is_retried_within_the_budget(trial: TrialDir):
    """Without a budget the trial stays failed."""
    broken = {**FULL, "error": "RuntimeError: CUDA error: uncorrectable ECC error encountered"}
    trial.claim(broken)
    mark_failed(trial, broken["error"])
    assert not retry_policy.apply_retry(trial, {})
    assert trial.failed.exists()
    found = retry_policy.apply_retry(trial, {**RETRIES, "node": 1})
    assert found is not None
    assert found.cause == "node"
    assert not trial.failed.exists()
    trial.claim(broken)
    assert not retry_policy.apply_retry(trial, {**RETRIES, "node": 1})


def test_an_error_of_the_users_code_is_never_retried(trial: TrialDir):
    trial.claim({**FULL, "error": "RuntimeError: a bug of the user's"})
    assert not retry_policy.apply_retry(trial, {**RETRIES, "error": 9})


WRITTEN_LATER = {**LOST, "ended": 2, "cause": "killed", "slurm_state": "FAILED"}
LOST_JOBS = [{**LOST, "job_id": job} for job in ("0", "1", "2")]
RETRIED = {"cause": "error", "ended": 1, "forgiven": True}  # by `jepa retry`
BAD_NODE = {"cause": "node", "ended": 1, "excluded": ["n3"]}
PREEMPTED = {"cause": "preempted", "ended": 1}


@pytest.mark.parametrize(
    ("records", "exhausted"),
    [
        pytest.param([LOST] * 5, False, id="Slurm requeued one job"),
        pytest.param([WRITTEN_LATER] * 5, False, id="submit wrote its ends"),
        pytest.param(LOST_JOBS, True, id="three jobs"),
        pytest.param(LOST_JOBS[:2], False, id="two jobs"),
        pytest.param([PREEMPTED] * 9, False, id="preemptions"),
        pytest.param([BAD_NODE] * 9, True, id="nodes that fail in an attempt"),
        pytest.param([*LOST_JOBS, RETRIED], False, id="retried by the user"),
    ],
)
def test_more_lost_jobs_than_allowed_exhaust_the_budget(
    records: list[dict[str, Any]], exhausted: bool, trial: TrialDir
):
    """Two are allowed here. Preemptions and requeues by Slurm do not count."""
    for record in records:
        trial.claim(record)
    reason, _ = exhausted_budget(trial.attempts(), {**RETRIES, "killed": 2, "node": 2})
    assert ("allows 2" in reason) == exhausted


def test_half_the_micro_batch_keeps_batch_and_identity(trial: TrialDir):
    before = trial.read_config()
    after = retry_policy.halve_micro_batch(before, [{**FULL, "attempt": 1}, {**FULL, "attempt": 1}])
    assert after.runtime.micro_batch == before.recipe.optim.batch // 4
    assert after.id == before.id
    unchanged = retry_policy.halve_micro_batch(before, [{"cause": "done", "attempt": 1}])
    assert unchanged == before


@pytest.mark.parametrize(
    ("images", "sizes"),
    [(8, [4, 2, 1]), (9, [3, 1]), (22, [11, 2, 1]), (30, [15, 6, 3, 1]), (7, [1]), (1, [])],
)
def test_each_gpu_oom_makes_the_micro_batch_that_the_trainer_takes_smaller(
    tmp_path: Path, images: int, sizes: list[int]
):
    """Also where half of it does not divide the images of a rank. The config can be read again."""
    made = config("vit_a", (0.15, 0.2), 0, 60)
    optim = replace(made.recipe.optim, batch=2 * images)
    runtime = replace(made.runtime, procs_per_node=2)
    made = TrialConfig(replace(made.recipe, optim=optim), runtime)
    trial = Root(tmp_path).trial_of(made)
    trial.create(made)
    found: list[int] = []
    for _ in sizes:
        trial.claim({**FULL, "start_step": 0, "end_step": 0})
        assert retry_policy.apply_retry(trial, RETRIES)
        after = trial.read_config()
        found.append(micro_batch(after.recipe, after.runtime, 2))
    assert found == sizes
    trial.claim({**FULL, "start_step": 0, "end_step": 0})
    assert not retry_policy.apply_retry(trial, RETRIES)


def test_an_illegal_memory_access_on_two_nodes_is_an_error_of_the_program(trial: TrialDir):
    """The first one is taken for a broken GPU, and so are two on one node."""
    illegal = "AcceleratorError: CUDA error: an illegal memory access was encountered\nMore text"
    record = {"cause": "error", "error": illegal, "ended": 2, "started": 1, "node": "n1"}
    for node, retried in (("n1", True), ("n1", True), ("n2", False)):
        trial.claim({**record, "node": node})
        mark_failed(trial, illegal)
        assert bool(retry_policy.apply_retry(trial, {**RETRIES, "node": 9})) == retried
    last = failures.classify_attempt(trial.attempts()[-1])
    assert last.cause == "error"
    assert "the same on node n1" in last.evidence
    assert trial.failed.exists()


def test_starts_without_an_attempt_are_counted_over_requeues_and_chained_jobs(
    trial: TrialDir,
) -> None:
    sweep = trial.root.sweep("ask")
    sweep.arrays.mkdir(parents=True)

    def record(
        job: str,
        **facts: object,
    ) -> None:
        array = {"job": job, "trials": [trial.name], "submitted": int(job), **facts}
        write_json(sweep.array(f"ask.A.{job}"), array)

    def lost_starts(
        job: str,
        restarts: int,
    ) -> int:
        env = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restarts)}
        return retry_policy.lost_starts(trial, env)

    for job in ("7", "8", "9"):
        record(job)
    assert lost_starts("9", 0) == 3
    assert lost_starts("9", 2) == 5
    trial.claim({"job_id": "9"})
    trial.claim({"job_id": "8"})
    assert lost_starts("9", 2) == 3
    record("9", resumed=True)
    assert lost_starts("9", 2) == 2


def test_starts_that_ended_by_preemption_do_not_count(trial: TrialDir) -> None:
    """Also those of other jobs. Of several ranks the first one records why a start ended."""
    sweep = trial.root.sweep("ask")
    sweep.arrays.mkdir(parents=True)
    for job in ("7", "8"):
        array = {"job": job, "trials": [trial.name], "submitted": int(job)}
        write_json(sweep.array(f"ask.A.{job}"), array)
    env = {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "3"}
    assert retry_policy.lost_starts(trial, env) == 5
    for launch in ("7.0", "8.0", "8.1", "8.2"):
        trial.end_start(launch, {"cause": "preempted", "job_id": launch[0]})
    assert retry_policy.lost_starts(trial, env) == 1
    trial.end_start("8.3", {"cause": "infrastructure", "job_id": "8"})
    trial.end_start("8.3", {"cause": "preempted", "job_id": "8"})
    assert retry_policy.lost_starts(trial, env) == 1
    trial.claim({"job_id": "8", "launch": "8.2"})  # rank 0 was preempted during its claim
    assert retry_policy.lost_starts(trial, env) == 1
    (trial.path / "logs" / "start.8.1").write_text("{")
    assert retry_policy.lost_starts(trial, env) == 2


def test_starts_on_bad_nodes_count_unless_the_node_is_excluded_now(trial: TrialDir) -> None:
    (trial.path / "logs").mkdir()
    env = {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "2"}
    bad = {**BAD_NODE, "job_id": "8"}
    trial.end_start("8.0", bad)
    trial.end_start("8.1", {**bad, "excluded": [], "exclude_refused": "too few"})
    assert retry_policy.lost_starts(trial, env) == 2
