"""The trial directory and its spool: what a crash at any point leaves is readable and means one thing."""

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from test_config import plain

from jepa_cluster.config import config_from_dict, config_to_dict
from jepa_cluster.errors import TrialError
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import write_atomic
from jepa_cluster.trial.spool import Spool, merge, read


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    config = config_from_dict(plain())
    made = Root(tmp_path).trial(config.name)
    made.create(config)
    return made


def test_creating_a_trial_twice_is_one_trial(trial: TrialDir):
    """Equal trials of two sweeps are one; nothing half-made is left beside it."""
    trial.create(config_from_dict(plain()))
    assert [p.name for p in trial.path.parent.iterdir()] == [trial.name]
    assert trial.read_config() == config_from_dict(plain())


def test_a_later_submit_may_move_a_trial_but_not_change_it(trial: TrialDir):
    """The runtime is replaced, the recipe is refused."""
    trial.create(config_from_dict(plain(runtime={"data_root": "elsewhere", "workers": 1})))
    assert trial.read_config().runtime.data_root == "elsewhere"
    with pytest.raises(TrialError, match="another recipe"):
        trial.create(config_from_dict(plain(seed=7)))


def test_a_hand_edited_config_is_refused(trial: TrialDir):
    """The identity document is the witness."""
    trial.config.write_text(trial.config.read_text().replace("lr: 0.001", "lr: 0.1"))
    with pytest.raises(TrialError, match="changed after it was frozen"):
        trial.read_config()


VERSION_1 = """
model: {name: vit_x, width: 64, depth: 2, heads: 2, mlp_ratio: 4.0, patch: 8, image: 64, init: released, timm: {}}
predictor: {width: 32, depth: 1, heads: 2}
mask: {mode: clean, targets: 4, target_scale: [0.15, 0.2], target_aspect: [0.75, 1.5], context_scale: [0.85, 1.0],
       aspect_law: log, context_keep: 20, keep_quantile: 0.05, official_batch: 64, min_keep: 4}
data: {name: tiny, digest: abc, images: 100, order: block, block: 32, window: 512}
optim: {batch: 8, steps: 10, epochs: null, warmup_steps: 2, warmup_epochs: null, start_lr: 0.0001, lr: 0.001,
        final_lr: 1.0e-6, weight_decay: 0.04, final_weight_decay: 0.4, decay_shape: cosine, momentum: 0.99,
        final_momentum: 1.0, stretch: 1.25, loss: l2,
        watch: {rollbacks: 3, every: 40, spike: 8.0, target_std: 0.02, rankme: 1.5, patience: 3}}
probe: {}
seed: 0
"""


def test_a_trial_of_identity_version_1_can_be_read_but_not_trained(trial: TrialDir):
    """Its settings have the names of today; a change by hand is detected all the same."""
    recipe = yaml.safe_load(VERSION_1)
    trial.identity.write_text(json.dumps({"identity_version": 1, "recipe": recipe}))
    runtime = {"data_root": "data", "shard": 2, "stage": "scratch"}
    trial.config.write_text(yaml.safe_dump({**recipe, "runtime": runtime}))

    config = trial.read_config(older=True)
    mask, data, optim = config.recipe.mask, config.recipe.data, config.recipe.optim
    assert (mask.mode, mask.aspect_distribution, mask.reference_batch) == ("multiblock", "log", 64)
    assert (data.shuffle_block, data.shuffle_window) == (32, 512)
    assert (optim.schedule_stretch, config.recipe.objective.loss) == (1.25, "l2")
    assert config.recipe.model.init == "reference"
    assert (config.runtime.fsdp_shard_size, config.runtime.staging_dir) == (2, "scratch")

    with pytest.raises(TrialError, match="identity version 1, this code trains version 2") as caught:
        trial.read_config()
    assert "submit the sweep again" in caught.value.hint
    trial.config.write_text(trial.config.read_text().replace("lr: 0.001", "lr: 0.1"))
    with pytest.raises(TrialError, match="changed after it was frozen"):
        trial.read_config(older=True)


def test_a_setting_at_its_default_does_not_change_the_identity():
    """So a setting that is added later, with a default that keeps the numbers, renames no trial."""
    config = config_from_dict(plain())
    spelled_out = config_from_dict(config_to_dict(config))
    assert spelled_out.id == config.id
    assert "objective" not in config.identity()["recipe"]
    assert config_from_dict(plain(objective={"loss": "l2"})).id != config.id


def test_a_torn_config_is_one_clear_error(trial: TrialDir):
    """Not a traceback from the YAML reader."""
    trial.config.write_text("")
    with pytest.raises(TrialError, match="empty or torn"):
        trial.read_config()


def test_sweeps_share_a_trial_without_erasing_each_other(trial: TrialDir):
    """point.json holds one entry a sweep."""
    trial.add_point("a", {"model": "vit_t"})
    trial.add_point("b", {"mask.targets": 4})
    assert json.loads(trial.point.read_text()) == {"a": {"model": "vit_t"}, "b": {"mask.targets": 4}}


def test_sixteen_claimants_get_sixteen_numbers(trial: TrialDir):
    """The attempt number is a fence: no two writers ever hold the same one."""
    context = multiprocessing.get_context("fork")
    with context.Pool(8) as pool:
        numbers = pool.map(_claim, [trial] * 16)
    assert sorted(numbers) == list(range(1, 17))
    assert trial.newest_attempt() == 16


def _claim(trial: TrialDir) -> int:
    return trial.claim({"launch": os.getpid()})


def test_a_claim_ends_when_the_directory_listing_is_stale(trial: TrialDir, monkeypatch: pytest.MonkeyPatch):
    """An NFS client may list one attempt for a minute although there are three; the claim does not wait for it."""
    for _ in range(3):
        trial.claim({})
    asked: list[int] = []

    def stale(self: TrialDir) -> int:
        asked.append(1)
        assert len(asked) < 100, "the claim reads the same stale listing again and again"
        return 1

    monkeypatch.setattr(TrialDir, "newest_attempt", stale)
    assert trial.claim({}) == 4


def test_superseded_makes_the_client_revalidate_the_directory(trial: TrialDir, monkeypatch: pytest.MonkeyPatch):
    """The listing is served from a cache until the client has created or removed something in the directory."""
    trial.claim({})
    cached = trial.attempt_numbers()
    trial.claim({})  # by another node
    monkeypatch.setattr(TrialDir, "attempt_numbers", lambda self: cached)
    real = os.unlink

    def unlink(path: str | Path, **options: int | None) -> None:
        real(path, **options)
        if Path(path).parent.name == "attempts":
            monkeypatch.undo()

    monkeypatch.setattr(os, "unlink", unlink)
    assert trial.newest_attempt() == 1
    assert trial.superseded(1) and not trial.superseded(2)
    assert [p.name for p in (trial.path / "attempts").iterdir()] == ["0001.json", "0002.json"], "nothing is left"


def test_superseded_is_a_plain_look_on_a_disk_that_takes_no_file(trial: TrialDir, monkeypatch: pytest.MonkeyPatch):
    """Read-only or full: the answer is that of the listing."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    trial.claim({})
    monkeypatch.setattr("jepa_cluster.trial.files.tempfile.mkstemp", refused)
    assert trial.superseded(0) and not trial.superseded(1)


def test_a_write_that_is_killed_leaves_the_old_file(tmp_path: Path):
    """All of it or nothing."""
    path = tmp_path / "x.json"
    write_atomic(path, "old")
    process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(path,))
    process.start()
    time.sleep(0.2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert set(path.read_text()) in ({"o", "l", "d"}, {"a"}, {"b"})


def _write_for_ever(path: Path) -> None:
    while True:
        write_atomic(path, "a" * 200_000)
        write_atomic(path, "b" * 200_000)


def test_rows_up_to_a_commit_are_settled_and_the_rest_is_not(trial: TrialDir):
    """The step-0 row counts like any other."""
    spool = Spool(trial, 1)
    for step in range(5):
        spool.log(step, {"loss": step})
    spool.commit(3)
    history = read(trial)
    assert [r.step for r in history.rows] == [0, 1, 2, 3, 4]
    assert [r.step for r in history.settled_rows] == [0, 1, 2, 3] and history.settled == 3


def test_a_later_attempt_wins_above_the_watermark_and_never_below(trial: TrialDir):
    """Attempt 2 must begin at 2 (checkpoint 3 was damaged); step 3 is settled, so it is not written again."""
    first = Spool(trial, 1)
    for step in range(6):
        first.log(step, {"loss": 1.0})
    first.commit(3)
    second = Spool(trial, 2, settled=2)
    for step in (3, 4):
        second.log(step, {"loss": 2.0})
    history = read(trial)
    assert [(r.step, r.values["loss"]) for r in history.rows] == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2)]


def test_a_zombie_changes_nothing(trial: TrialDir):
    """Writes of attempt 1 after attempt 2 began are void, its commit included."""
    first = Spool(trial, 1)
    first.log(1, {"loss": 1.0})
    first.commit(1)
    second = Spool(trial, 2, settled=1)
    second.log(2, {"loss": 2.0})
    first.log(2, {"loss": 9.0})
    first.log(3, {"loss": 9.0})
    first.commit(3)
    history = read(trial)
    assert [(r.step, r.values["loss"]) for r in history.rows] == [(1, 1), (2, 2)] and history.settled == 1


def test_a_torn_last_line_is_not_read_and_a_damaged_one_is_counted(trial: TrialDir):
    """The machine died in the middle of a write."""
    spool = Spool(trial, 1)
    spool.log(1, {"loss": 1.0})
    spool.close()
    with trial.metrics(1).open("ab") as f:
        f.write(b'{"step": 2, "t": 1, \x00\x00\n{"step": 3, "t"')
    history = read(trial)
    assert [r.step for r in history.rows] == [1] and history.damaged == 1


def test_an_attempt_killed_before_its_first_line_counts_for_nothing():
    """No head line, no claim on history."""
    rows = {"step": 1, "t": 1, "loss": 1.0}
    assert merge({1: [{"settled": -1}, rows, {"commit": 1}], 2: []}).settled == 1


def test_spools_of_identity_version_1_keep_what_a_rollback_could_still_take_back():
    """There a checkpoint held rows above what was settled, and a rollback event voided them."""
    rows = [{"step": step, "t": 0, "loss": 1.0} for step in (10, 20, 30, 40)]
    first = [{"start": 0, "settled": -1}, *rows, {"commit": 20}]
    second = [{"start": 40, "settled": 20}, {"step": 50, "t": 0, "loss": 1.0}]
    assert [row.step for row in merge({1: first, 2: second}).rows] == [10, 20, 30, 40, 50]
    rollback = {"event": "rollback", "step": 50, "to": 20}
    assert [row.step for row in merge({1: first, 2: [*second, rollback]}).rows] == [10, 20]
