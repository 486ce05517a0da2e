"""The verbs that train and test one trial: train, probe."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.options import (
    TRIAL_HELP,
    Args,
    add_trials_arguments,
    command,
    finish,
    info,
    print_json,
    root_of,
    select_trials,
)
from jepa_cluster.errors import CheckpointError, DataError, plural
from jepa_cluster.labels import format_number


def add(verbs: Verbs) -> None:
    parser = command(verbs, train)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings in Hydra's grammar, as in conf/"
    )
    parser.add_argument(
        "--trial", type=Path, help="resume this trial directory instead of composing a trial"
    )
    parser.add_argument(
        "--procs", type=int, help="number of processes (default: that of the profile, 2 on CPU)"
    )

    parser = command(verbs, probe)
    add_trials_arguments(parser, TRIAL_HELP)
    parser.add_argument("--images", type=int, help="maximum number of images per split")


def train(args: Args) -> int:
    """Train one trial on this machine; ^C saves a checkpoint, and the same command resumes."""
    from jepa_cluster.launch.ops import single_trial
    from jepa_cluster.trial.directory import TrialDir
    from jepa_cluster.trial.files import read_json

    if args.trial:
        trial = TrialDir(args.trial.absolute())
    else:
        trial = single_trial.create_trial(root_of(args), args.overrides, args.procs)
    configured = single_trial.world_size(trial)  # raises TrialError when there is no trial
    world = args.procs or configured
    info(args, str(trial.path))
    if trial.done.exists():
        return finish(args, single_trial.summary(trial, 0), "is done; nothing to do")
    if trial.failed.exists():
        error = (read_json(trial.failed) or {}).get("error", "")
        info(args, f"the last attempt failed, trying again: {error}")
        trial.failed.unlink()
    info(args, f"{plural(world, 'rank')}; ^C saves a checkpoint and stops")
    with single_trial.local_launcher(world, partial(info, args)) as run_attempt:
        code = single_trial.worst_code(run_attempt(trial))
    end = single_trial.summary(trial, code)
    step = "?" if end["step"] is None else end["step"]
    text = f"{end['cause']} at step {step}"
    if end["error"]:
        text += f"\n  {end['error']}"
    if end["error"] and end["attempts"]:
        text += f"\n  logs: {end['logs']}"
    finish(args, end, text)
    return code if code >= 0 else 128 - code


def probe(args: Args) -> int:
    """Evaluate trials with a logistic probe (1 percent of the labels) and an attentive probe.

    Of several trials, one that cannot be probed is reported and skipped.
    """
    from jepa_cluster.training.evaluate import evaluate

    trials = select_trials(args)
    documents: list[dict[str, Any]] = []
    failed = False
    for trial in trials:
        document: dict[str, Any] = {"trial": trial.name}
        try:
            document.update(evaluate(trial, args.images))
        except (CheckpointError, DataError) as e:
            if len(trials) == 1:
                raise
            document["error"] = e.what
            failed = True
        documents.append(document)
        for name, value in document.items():
            shown = format_number(value) if isinstance(value, float) else value
            info(args, f"{name:20s} {shown}")
    print_json(args, documents)
    return int(failed)
