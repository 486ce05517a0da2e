"""The trial directory: its frozen config, and the attempt numbers that fence writers."""

import errno
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from test_config import plain

from jepa_cluster.config import config_from_dict, config_to_dict
from jepa_cluster.errors import JepaError, TrialError
from jepa_cluster.trial import attempts
from jepa_cluster.trial.attempts import FRUITLESS
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    config = config_from_dict(plain())
    made = Root(tmp_path).trial_of(config)
    made.create(config)
    return made


def test_creating_a_trial_twice_makes_one_directory(trial: TrialDir):
    """Equal trials of two sweeps share it, and no temporary folder is left beside it."""
    trial.create(config_from_dict(plain()))
    assert list(trial.path.parent.iterdir()) == [trial.path]
    assert trial.read_config() == config_from_dict(plain())


def test_a_trial_that_has_not_started_takes_four_inodes(trial: TrialDir, tmp_path: Path):
    """The first claim makes the folders. Every reader takes a trial without them."""
    new = Root(tmp_path / "other").trial_of(trial.read_config())
    assert new.create(trial.read_config(), points={"s": {"seed": 0}})
    assert {path.name for path in new.path.iterdir()} == {
        "config.yaml",
        "identity.json",
        "point.json",
    }
    assert new.attempts() == new.committed() == []
    assert new.newest_attempt() == 0
    assert not new.superseded(0)
    assert new.claim({"launch": "a"}) == 1
    for folder in (new.attempt(1).parent, new.metrics(1).parent, new.logs(1).parent):
        assert folder.is_dir()
    assert new.checkpoints.is_dir()


def test_a_later_submit_may_change_the_runtime_but_not_the_recipe(trial: TrialDir):
    trial.create(config_from_dict(plain(runtime={"data_root": "elsewhere", "workers": 1})))
    assert trial.read_config().runtime.data_root == "elsewhere"
    with pytest.raises(TrialError, match="another recipe"):
        trial.create(config_from_dict(plain(seed=7)))


def test_a_later_submit_keeps_the_milestones_where_branches_begin(trial: TrialDir) -> None:
    """Of another sweep, which the later one does not know."""
    config = trial.read_config()
    for steps in ((9, 18), (), (4,)):
        trial.create(replace(config, runtime=replace(config.runtime, milestones=steps)))
    assert trial.read_config().runtime.milestones == (4, 9, 18)


def test_a_hand_edited_config_is_refused(trial: TrialDir):
    """It differs from the identity document."""
    trial.config.write_text(trial.config.read_text().replace("lr: 0.001", "lr: 0.1"))
    with pytest.raises(TrialError, match="changed after it was frozen"):
        trial.read_config()


VERSION_1 = """
model: {name: vit_x, width: 64, depth: 2, heads: 2, mlp_ratio: 4.0, patch: 8, image: 64,
        init: released, timm: {}}
predictor: {width: 32, depth: 1, heads: 2}
mask: {mode: clean, targets: 4, target_scale: [0.15, 0.2], target_aspect: [0.75, 1.5],
       context_scale: [0.85, 1.0],
       aspect_law: log, context_keep: 20, keep_quantile: 0.05, official_batch: 64, min_keep: 4}
data: {name: tiny, digest: abc, images: 100, order: block, block: 32, window: 512}
optim: {batch: 8, steps: 10, epochs: null, warmup_steps: 2, warmup_epochs: null,
        start_lr: 0.0001, lr: 0.001,
        final_lr: 1.0e-6, weight_decay: 0.04, final_weight_decay: 0.4, decay_shape: cosine,
        momentum: 0.99, final_momentum: 1.0, stretch: 1.25, loss: l2,
        watch: {rollbacks: 3, every: 40, spike: 8.0, target_std: 0.02, rankme: 1.5, patience: 3}}
probe: {}
seed: 0
"""


def test_a_trial_of_identity_version_1_can_be_read_but_not_trained(trial: TrialDir):
    """Its settings have the current names, and an edit by hand is still detected."""
    recipe = yaml.safe_load(VERSION_1)
    trial.identity.write_text(json.dumps({"identity_version": 1, "recipe": recipe}))
    runtime = {"data_root": "data", "shard": 2, "stage": "scratch"}
    trial.config.write_text(yaml.safe_dump({**recipe, "runtime": runtime}))

    config = trial.read_config(older=True)
    mask = config.recipe.mask
    data = config.recipe.data
    optim = config.recipe.optim
    assert mask.mode == "multiblock"
    assert mask.aspect_distribution == "log"
    assert mask.reference_batch == 64
    assert data.shuffle_block == 32
    assert data.shuffle_window == 512
    assert optim.schedule_stretch == 1.25
    assert config.recipe.objective.loss == "l2"
    assert config.recipe.model.init == "reference"
    assert config.runtime.fsdp_shard_size == 2
    assert config.runtime.staging_dir == "scratch"

    message = "identity version 1, this code trains version 2"
    with pytest.raises(TrialError, match=message) as caught:
        trial.read_config()
    assert "submit the sweep again" in caught.value.hint
    trial.config.write_text(trial.config.read_text().replace("lr: 0.001", "lr: 0.1"))
    with pytest.raises(TrialError, match="changed after it was frozen"):
        trial.read_config(older=True)


def test_a_setting_at_its_default_does_not_change_the_identity():
    """A later version may add a setting without renaming trials."""
    config = config_from_dict(plain())
    spelled_out = config_from_dict(config_to_dict(config))
    assert spelled_out.id == config.id
    assert "objective" not in config.identity()["recipe"]
    assert config_from_dict(plain(objective={"loss": "l2"})).id != config.id


def test_a_trial_of_a_version_with_another_runtime_setting_can_be_read(trial: TrialDir):
    """A setting that was removed since changes no number, so the trial can go on."""
    config = trial.read_config()
    text = trial.config.read_text()
    assert "  kill_after" not in text
    trial.config.write_text(text.replace("runtime:\n", "runtime:\n  kill_after: null\n"))
    assert trial.read_config() == config


def test_a_config_torn_in_its_last_section_is_one_clear_error(trial: TrialDir):
    text = trial.config.read_text()
    trial.config.write_text(text[: text.index("runtime:") + len("runtime:\n")])
    with pytest.raises(JepaError):
        trial.read_config()


def test_a_torn_config_is_one_clear_error(trial: TrialDir):
    """The user sees no traceback of the YAML reader."""
    trial.config.write_text("")
    with pytest.raises(TrialError, match="empty, torn or not plain YAML"):
        trial.read_config()


@pytest.mark.parametrize("lost", ["config", "identity"])
@pytest.mark.parametrize("content", [None, ""])
def test_a_new_trial_that_a_crash_of_the_machine_emptied_is_written_again(
    trial: TrialDir, lost: str, content: str | None
):
    """A submit syncs all its trials at once, before it hands any to a scheduler."""
    config = trial.read_config()
    files = {path: path.read_text() for path in (trial.config, trial.identity)}
    path = getattr(trial, lost)
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert not trial.create(config, durable=False)
    assert {path: path.read_text() for path in files} == files


def test_a_trial_that_has_started_is_never_written_again(trial: TrialDir):
    config = trial.read_config()
    trial.claim({})
    trial.identity.write_text("")
    with pytest.raises(TrialError, match="not valid JSON"):
        trial.create(config)


def test_sweeps_share_a_trial_without_erasing_each_other(trial: TrialDir):
    """point.json holds one entry per sweep."""
    trial.add_point("a", {"model": "vit_t"})
    trial.add_point("b", {"mask.targets": 4})
    assert json.loads(trial.point.read_text()) == {
        "a": {"model": "vit_t"},
        "b": {"mask.targets": 4},
    }


def test_sixteen_claims_get_sixteen_attempt_numbers(trial: TrialDir):
    """The attempt number is a fence: no two writers have the same one."""
    context = multiprocessing.get_context("fork")
    with context.Pool(8) as pool:
        numbers = pool.map(claim, [trial] * 16)
    assert sorted(numbers) == list(range(1, 17))
    assert trial.newest_attempt() == 16


def claim(trial: TrialDir) -> int:
    return trial.claim({"launch": os.getpid()})


def test_a_claim_ends_when_the_directory_listing_is_stale(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
):
    """An NFS client may list one of three attempts for a minute; the claim does not wait."""
    for _ in range(3):
        trial.claim({})
    calls = 0

    def stale(self: TrialDir) -> int:
        nonlocal calls
        calls += 1
        assert calls < 100, "the claim reads the same stale listing again and again"
        return 1

    monkeypatch.setattr(TrialDir, "newest_attempt", stale)
    assert trial.claim({}) == 4


def test_superseded_makes_the_client_revalidate_the_directory(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
):
    """An NFS client caches the listing until it creates or removes a file in the directory."""
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
    assert trial.superseded(1)
    assert not trial.superseded(2)
    files = [path.name for path in (trial.path / "attempts").iterdir()]
    assert files == ["0001.json", "0002.json"], "a temporary file is left"


def test_superseded_uses_the_listing_if_no_file_can_be_created(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
):
    """The disk is read-only or full."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    trial.claim({})
    monkeypatch.setattr(Path, "touch", refused)
    assert trial.superseded(0)
    assert not trial.superseded(1)


def test_a_trial_is_stuck_after_some_attempts_without_progress(trial: TrialDir) -> None:
    """Attempts that hang before they have loaded a checkpoint lack start_step, and count."""
    trial.claim({"launch": "launch"})
    assert not trial.is_stuck()
    while len(trial.attempts()) < FRUITLESS:
        trial.claim({"launch": "another"})
    assert trial.is_stuck()
    trial.amend(2, {"start_step": 8})
    assert not trial.is_stuck()


def test_a_folder_that_cannot_be_listed_is_an_error(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken for an empty folder, it would start the trial at step 0 and lift the fence."""

    def refuse(path: object) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    for read in (trial.committed, trial.newest_attempt, trial.attempts):
        with pytest.raises(PermissionError):
            read()


def test_an_end_survives_what_rank_0_adds_meanwhile(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
):
    """Rank 0 has read its record and has not yet written it when another rank ends the attempt."""
    number = trial.claim({"started": 1})
    write = attempts.write_json

    def write_late(path: Path, value: object) -> None:
        monkeypatch.setattr(attempts, "write_json", write)
        assert trial.end_attempt(number, {"cause": "error", "ended": 2})
        write(path, value)

    monkeypatch.setattr(attempts, "write_json", write_late)
    trial.add_to_attempt(number, {"end_step": 7})
    assert trial.read_attempt(number) == {
        "attempt": number,
        "started": 1,
        "ended": 2,
        "cause": "error",
        "end_step": 7,
    }


def test_the_first_rank_that_ends_an_attempt_decides(trial: TrialDir):
    number = trial.claim({})
    assert trial.end_attempt(number, {"cause": "error"})
    assert not trial.end_attempt(number, {"cause": "lost"})
    trial.amend(number, {"halved": 8})
    assert trial.read_attempt(number) == {"attempt": number, "cause": "error", "halved": 8}


def test_the_first_rank_that_fails_a_trial_decides(trial: TrialDir) -> None:
    trial.write_failed("error", "of rank 3", attempt=1)
    trial.write_failed("node", "of rank 0, which saw a consequence", attempt=1)
    assert (read_json(trial.failed) or {})["error"] == "of rank 3"


def test_an_end_that_could_not_be_written_does_not_block_another_one(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
):
    """The disk is full when the first rank writes; nothing is left of it."""
    number = trial.claim({})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            trial.end_attempt(number, {"cause": "error"})
    assert trial.end_attempt(number, {"cause": "lost"})
    names = sorted(path.name for path in trial.attempt(number).parent.iterdir())
    assert names == ["0001.end.json", "0001.json"]


def test_a_torn_end_counts_as_none(trial: TrialDir):
    number = trial.claim({"started": 1})
    trial.attempt_end(number).write_text('{"cau')
    assert trial.read_attempt(number) == {"attempt": number, "started": 1}
