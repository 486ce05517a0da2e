"""Texts that users and programs rely on: the command line, identities, batch scripts, files."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.launch.cluster import profile as resources
from jepa_cluster.launch.cluster.arrays import Array
from jepa_cluster.launch.cluster.profile import ResourceClass
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.scheduler.facts import StatusSnapshot
from jepa_cluster.launch.submit import sbatch
from jepa_cluster.launch.submit.plan import Plan
from jepa_cluster.launch.submit.sbatch import Submission
from jepa_cluster.sweep.points import Sweep
from jepa_cluster.sweep.reconcile import Actions
from jepa_cluster.sweep.resolve import new_name
from jepa_cluster.training.checkpoint_files import Manifest
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.spool import Spool

Golden = Callable[[str, str], None]


def describe(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield a line per verb and argument, for any terminal width and version of argparse."""
    groups: list[argparse._SubParsersAction] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            groups.append(action)
        elif not isinstance(action, argparse._HelpAction):
            yield f"    {name_of(action)}: {action.help}"
    for group in groups:
        helps = {choice.dest: choice.help for choice in group._choices_actions}
        for verb, verb_parser in group.choices.items():
            yield f"{parser.prog} {verb}: {helps.get(verb, '')}"
            yield from describe(verb_parser)


def name_of(argument: argparse.Action) -> str:
    """Return the options or the metavar of an argument, with its choices."""
    name = ", ".join(argument.option_strings) or str(argument.metavar or argument.dest)
    if not argument.choices:
        return name
    choices = ",".join(map(str, argument.choices))
    return f"{name} {{{choices}}}"


def test_every_verb_and_its_arguments(golden: Golden) -> None:
    golden("help.txt", "\n".join(describe(cli.parser())) + "\n")


def test_identities_of_three_trials(golden: Golden) -> None:
    """A changed name means that a finished trial is trained again."""
    configs = [
        fake_trials.config("vit_a", (0.15, 0.2), 0, 60),
        fake_trials.config("vit_b", (0.15, 0.2), 3, 60),
        fake_trials.config("vit_a", (0.05, 0.1), 0, 120, (0.3, 0.6)),
    ]
    identities = {new_name({}, config.recipe.seed, config): config.identity() for config in configs}
    golden("identities.json", json.dumps(identities, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize(("letter", "nodes", "minutes"), [("a", 1, 720), ("b", 2, 1440)])
def test_the_batch_script_of_a_resource_class(
    golden: Golden,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    letter: str,
    nodes: int,
    minutes: int,
) -> None:
    """The profile is the example. Paths of this machine are replaced by names."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(srun.parent), prepend=":")
    monkeypatch.setattr("sys.executable", "PYTHON")
    monkeypatch.setattr(slurm, "config", lambda: {"KillWait": "30 sec"})
    profile = resources.load_profile(Path("example"))
    resource_class = ResourceClass(nodes, profile.procs_per_node, minutes)
    array = Array(resource_class, letter, ("one", "two", "three"), 2)
    sweep = Sweep("sweep", question="Q")
    root = Root(tmp_path / "root")
    plan = Plan(root, sweep, profile, {}, StatusSnapshot({}), Actions(), {})
    text = sbatch.script_text(plan, Submission(array), f"jepa.sweep.{letter}.0", "code")
    golden(f"sbatch-{letter}.sh", text.replace(str(tmp_path), "$TMP").rstrip() + "\n")


def test_the_manifest_of_a_checkpoint(golden: Golden) -> None:
    manifest = Manifest(
        step=400,
        recipe="0123456789ab",
        world=4,
        attempt=2,
        counters={"images_seen": 6400.0},
        row=None,
        files={
            "shard-00000-of-00002.safetensors": (8, 1),
            "shard-00001-of-00002.safetensors": (8, 2),
        },
        versions={"torch": "2"},
        t=0,
        shards=2,
        tensors={
            "model.encoder.norm.weight": ("F32", (4,), True),
            "optim.updates": ("F32", (), False),
        },
    )
    golden("manifest.json", manifest.to_bytes().decode())


def test_an_attempt_record_and_the_lines_of_a_spool(golden: Golden, tmp_path: Path) -> None:
    """Times are replaced by their names."""
    trial = TrialDir(tmp_path)
    for folder in ("attempts", "metrics"):
        (tmp_path / folder).mkdir()
    begun = {
        "launch": "7.0",
        "kind": "slurm",
        "job": "7",
        "world": 2,
        "address": "n1:1234",
    }
    ended = {
        "start_step": 0,
        "end_step": 12,
        "cause": "done",
        "exit": 0,
    }
    number = trial.claim(begun)
    trial.end_attempt(number, ended)
    spool = Spool(trial, number)
    spool.log(10, {"loss": 0.25, "lr": 0.001})
    spool.event("checkpoint_failed", 10, error="No space left on device")
    spool.commit(10)
    spool.close()
    files = (trial.attempt(number), trial.attempt_end(number), trial.metrics(number))
    text = "".join(path.read_text() for path in files)
    golden("attempt.txt", re.sub(r'"t":\d+', '"t":TIME', text))
