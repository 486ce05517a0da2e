"""One clear error, or the right thing, where a command met something unusual."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import fake_trials
from support.submitted_sweep import SWEEP, Submitted

from jepa_cluster import cli
from jepa_cluster.launch.scheduler import local
from jepa_cluster.records import QueueEntry
from jepa_cluster.trial.directory import Root, default_root


def test_a_torn_plan_of_one_sweep_hides_no_other_sweep(
    submitted: Submitted, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(submitted.root.sweep("ask").path, submitted.root.sweep("torn").path)
    submitted.root.sweep("torn").plan.write_text("")
    assert cli.main(["status", "--json"]) == 1
    printed = capsys.readouterr()
    assert [sweep["sweep"] for sweep in json.loads(printed.out)] == ["ask"]
    assert "jepa: torn: plan.json is not valid JSON" in printed.err


def test_a_tilde_in_a_root_is_the_home_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JEPA_ROOT", "~/x")
    assert default_root() == Root(tmp_path / "x")
    cli.main(["status", "--root=~/y"])
    assert f"in {tmp_path}/y" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("key", ["grid", "zip", "list"])
def test_an_error_that_names_no_setting_has_the_line_of_the_axes(
    folder: Path, capsys: pytest.CaptureFixture[str], key: str
):
    """Also where all axes are in one line."""
    axes = "{model: [vit_ti], optim.epochs: [2]}"
    if key == "list":
        axes = "[{model: vit_ti, optim.epochs: 2}]"
    text = f"question: Q\nbase: [data=synthetic, optim.warmup_epochs=5]\n{key}: {axes}\n"
    (folder / "ask.yaml").write_text(text)
    assert cli.main(["plan", "ask.yaml"])
    assert "where: ask.yaml:3: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=0,1", "seed=0,1 is not a whole number"),
        ("mask.targets=2,4", "'mask.targets=2,4' is no plain setting"),
    ],
)
def test_train_takes_one_value_per_setting(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
):
    assert cli.main(["train", "data=synthetic", override])
    printed = capsys.readouterr().err
    assert message in printed
    assert "hint:" in printed
    assert not (folder / "root").exists()


def entry(trial: str) -> QueueEntry:
    return {"trial": trial, "code": "", "world": 1, "python": "", "environment": {}, "retries": {}}


def test_an_interrupted_enqueue_leaves_a_runner_for_what_it_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[int] = []
    monkeypatch.setattr(local, "start_runner", lambda root: started.append(len(queued(root))))

    def entries() -> Any:
        yield entry("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local.enqueue(Root(tmp_path), entries(), 1)
    assert started == [1]


def queued(root: Root) -> list[Path]:
    return local.waiting_entries(root)


def test_a_submit_starts_the_runner_of_a_queue_that_has_none(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The machine was switched off while trials waited."""
    started: list[Root] = []
    monkeypatch.setattr(local, "start_runner", started.append)
    local.enqueue(submitted.root, [entry(trial.name) for trial in submitted.trials], 1)
    assert len(started) == 1
    assert cli.main(["submit", "ask", "--yes"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert len(started) == 2


@pytest.mark.parametrize("out", ["w.safetensors", "folder", "link.pth"])
def test_an_export_never_overwrites_what_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
):
    (tmp_path / "folder").mkdir()
    source = tmp_path / "folder/model.safetensors"
    source.write_text("precious")
    (tmp_path / "w.safetensors").hardlink_to(source)
    (tmp_path / "link.pth").symlink_to(source)
    words = ["weights", "export", str(source), str(tmp_path / out), "--to", "published"]
    assert cli.main(words)
    assert "the export would overwrite it" in capsys.readouterr().err
    assert source.read_text() == "precious"


PROFILE = """
kind: slurm
partition: gpu
procs_per_node: 4
gpus_per_node: 4
cpus_per_proc: 2
mem_gb: 10
time: 1h
"""


def test_a_dry_run_needs_no_slurm_and_says_what_it_assumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A laptop has neither srun nor scontrol."""
    monkeypatch.setenv("PATH", str(folder))
    (folder / "mine.yaml").write_text(PROFILE)
    assert cli.main(["submit", "ask.yaml", "--cluster", "mine.yaml", "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    scripts = json.loads(printed.out)
    assert len(scripts) == 2
    assert "#SBATCH --array=0-1" in scripts[0]["script"]
    assert "assumed: MaxArraySize = 1001" in printed.err
    assert not (folder / "root").exists()
    assert cli.main(["submit", "ask.yaml", "--cluster", "mine.yaml", "--yes"])
    assert "is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["plan", "submit"])
def test_a_shipped_sweep_is_found_by_its_name(
    folder: Path, document: Callable[..., Any], verb: str
):
    """One that was submitted under this name comes first."""
    words = ["--dry-run"] if verb == "submit" else []
    if verb == "plan":
        fake_trials.data_root(folder / "data/demo", ("class", "count", "distance"))
        plan = document("plan", "demo")
        assert plan["sweep"] == "demo"
        assert plan["question"] != "Q"
    (folder / "root/sweeps/demo").mkdir(parents=True)
    (folder / "root/sweeps/demo/sweep.yaml").write_text(SWEEP)
    found = document(verb, "demo", *words)
    assert len(found["trials"] if verb == "plan" else found) == 4


def test_an_unknown_name_suggests_a_shipped_one(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["submit", "mask_scal"])
    assert "did you mean 'mask_scale'?" in capsys.readouterr().err
