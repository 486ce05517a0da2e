"""The command line as a whole: help, documents, and errors with a hint."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.submitted_sweep import Submitted

from jepa_cluster import cli
from jepa_cluster.cli.options import select_trials

Document = Callable[..., Any]
Capture = pytest.CaptureFixture[str]
HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "sweeps.md"
PRINT_HEAVY_MODULES = """
import sys
from jepa_cluster.cli import parser
parser().format_help()
heavy = {"torch", "timm", "mlflow", "webdataset", "hydra", "submitit", "numpy", "rich"}
print(heavy & set(sys.modules))
"""


def test_help_imports_no_heavy_module():
    command = [sys.executable, "-c", PRINT_HEAVY_MODULES]
    assert subprocess.check_output(command, text=True) == "set()\n"


def verb_group(parser: argparse.ArgumentParser) -> argparse._SubParsersAction | None:
    """Return the verbs of a parser, None for a command without verbs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action
    return None


def commands(
    parser: argparse.ArgumentParser,
    words: tuple[str, ...] = (),
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Yield every command with its parser, also those of two words: ('shards', 'build')."""
    group = verb_group(parser)
    if group is None:
        yield words, parser
        return
    for name, verb_parser in group.choices.items():
        yield from commands(verb_parser, (*words, name))


def test_every_verb_and_every_argument_has_help():
    group = verb_group(cli.parser())
    assert group is not None
    helps = {choice.dest: choice.help for choice in group._choices_actions}
    for name in ("plan", "submit", "status", "watch", "logs", "why"):
        assert name in helps
    for name in ("cancel", "retry", "resume", "requeue"):
        assert name in helps
    for name, parser in group.choices.items():
        assert helps.get(name), name
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help, (name, action.dest)


def test_every_command_has_a_document_but_ui_and_demo():
    """ui serves a page, and demo shows commands. The how-to says that they have none."""
    found = dict(commands(cli.parser()))
    assert len(found) > 30
    without: set[tuple[str, ...]] = set()
    for words, parser in found.items():
        if "--json" not in parser._option_string_actions:
            without.add(words)
    assert without == {("ui",), ("demo",)}
    page = HOWTO.read_text()
    assert "`ui`" in page
    assert "`demo`" in page


@pytest.mark.usefixtures("submitted")
def test_every_verb_that_selects_trials_has_the_same_error(capsys: Capture):
    """The error of an unknown axis has the nearest name."""
    verbs: set[str] = set()
    for words, parser in commands(cli.parser()):
        if any(action.dest == "selection" for action in parser._actions):
            verbs.add(words[0])
    assert verbs == {
        "plan",
        "submit",
        "status",
        "logs",
        "why",
        "cancel",
        "resume",
        "retry",
        "requeue",
        "repro",
        "export",
        "probe",
    }
    for verb in verbs:
        assert cli.main([verb, "ask", "modle=vit_s"]) == 78, verb
        assert "did you mean 'model'" in capsys.readouterr().err, verb


def selected(*words: str) -> list[str]:
    """Return the names of the trials that a command selects."""
    arguments = cli.parser().parse_args(words)
    return [trial.name for trial in select_trials(arguments)]


def test_probe_takes_trials_of_a_sweep(submitted: Submitted):
    names = [trial.name for trial in submitted.trials]
    assert selected("probe", "ask") == names
    assert selected("probe", "ask.yaml", "model=vit_ti") == names[:2]
    assert selected("probe", "ask", "model=vit_s", "targets=4") == [names[3]]


def test_probe_takes_a_trial_directory(submitted: Submitted):
    trial = submitted.trials[1]
    assert selected("probe", str(trial.path)) == [trial.name]


@pytest.mark.usefixtures("submitted")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("probe root/trials", "root/trials is no trial directory"),
        ("probe asc 0", "did you mean 'ask'"),
        ("probe ask seed=7", "no trial matches seed=7"),
        (
            "logs ask model=vit_ti",
            "2 trials match, logs takes one\n  hint:  name it, e.g. jepa logs ask 0",
        ),
    ],
)
def test_what_names_no_trial_is_refused(
    words: str,
    message: str,
    capsys: Capture,
):
    assert cli.main(words.split()) == 78
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_a_trial_directory_takes_no_selection(
    submitted: Submitted,
    capsys: Capture,
):
    assert cli.main(["probe", str(submitted.trials[1].path), "seed=0"]) == 78
    printed = capsys.readouterr()
    assert "nothing can be selected in one trial: seed=0" in printed.err
    assert not printed.out


@pytest.mark.usefixtures("folder")
def test_stdout_has_nothing_but_the_document(document: Document):
    """Progress is printed on stderr."""
    masks = document("masks", "show", "mask=reference")
    assert masks["mask"]["mode"] == "reference"
    assert len(masks["p_context"]) == 14
    sizes = ["--train", "16", "--val", "8", "--workers", "1"]
    drawn = document("shards", "synthetic", "images", *sizes)
    assert drawn == {
        "folder": "images",
        "train": 16,
        "val": 8,
        "drawn": True,
    }
    train, val = document("shards", "build", "images", "packed", "--workers", "1")
    assert train["images"] == 16
    assert val["images"] == 8
    verified = document("shards", "verify", "packed/val")
    assert verified == [{"split": "packed/val", "faults": []}]
    (info,) = document("shards", "info", "packed/train")
    assert info["digest"] == train["digest"]
    assert info["mixing"]["global"]["batch"] == 16


def test_every_verb_of_a_sweep_is_in_its_howto():
    group = verb_group(cli.parser())
    assert group is not None
    page = HOWTO.read_text()
    count = 0
    for name, parser in group.choices.items():
        handler = parser.get_default("run")
        if handler and handler.__module__.endswith(
            (".sweeps", ".trials", ".diagnose", ".maintain")
        ):
            count += 1
            assert f"jepa {name}" in page
    assert count > 12


@pytest.mark.usefixtures("submitted")
@pytest.mark.parametrize(
    "words",
    ["status asc", "plan nope.yaml", "plan ask.yaml --cluster nowhere"],
)
def test_an_unknown_sweep_or_profile_is_one_error(
    words: str,
    capsys: Capture,
):
    assert cli.main(words.split()) == 78
    error = capsys.readouterr().err
    assert error.startswith("jepa: ")
    assert "Traceback" not in error


@pytest.mark.usefixtures("submitted")
def test_the_error_of_an_unknown_sweep_has_the_nearest_name(capsys: Capture):
    assert cli.main(["status", "asc"]) == 78
    assert "did you mean 'ask'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("statsu", "jepa: no verb 'statsu': did you mean 'status'? (see jepa --help)\n"),
        (
            "shards bulid",
            "jepa shards: no verb 'bulid': did you mean 'build'? (see jepa shards --help)\n",
        ),
        (
            "weights export a b --to tim",
            "jepa weights export: --to cannot be 'tim': did you mean 'timm'?",
        ),
        ("why", "jepa why: the following arguments are required: sweep (see"),
    ],
)
def test_a_mistyped_command_is_one_line_with_the_nearest_name(
    words: str, message: str, capsys: Capture
):
    """The exit code is 2."""
    with pytest.raises(SystemExit) as e:
        cli.main(words.split())
    assert e.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.usefixtures("submitted")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["masks", "show", "mask.targets=0"], "mask.targets=0 is not 1 or more and at most 16"),
        (["masks", "show", "mask.target_scale=[0.2,0.1]"], "hint:  write it as [low, high]"),
        (
            ["masks", "show", "mask.target_scale=0.1"],
            "mask.target_scale wants [low, high], got 0.1",
        ),
        (["train", "seed=abc"], "seed=abc is not a whole number"),
        (["export", "ask", "--out", "t.xlsx"], "name it .csv or .parquet"),
        (
            ["export", "ask", "--curves", "--out", "lost/t.csv"],
            "cannot use lost/t.csv: No such file or directory",
        ),
        (["shards", "info", "lost"], "jepa shards build <images> lost\n"),
        (["shards", "verify", "lost/val"], "jepa shards build <images> lost\n"),
        (["shards", "build", "lost", "out"], "no source lost"),
        (["plan", "aks.yaml"], "did you mean 'ask'?"),
        (["plan", "ask.yaml", "--cluster", "exmaple"], "did you mean 'example'?"),
        (["plan", "ask.yaml", "--cluster", "ask.yml"], "did you mean 'ask'?"),
        (["status", "ask", "state=faild"], "did you mean 'failed'?"),
        (["status", "ask", "model=vit_ss"], "did you mean 'vit_s'?"),
        (["status", "ask", "targets=3"], "known: 2, 4"),
        (["scaling", "next", "ask"], "jepa scaling next ask wants --gpu-hours"),
    ],
)
def test_a_command_that_cannot_run_is_one_error(
    words: list[str],
    message: str,
    capsys: Capture,
):
    assert cli.main(words) == 78
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("jepa: ")
    assert not printed.out


@pytest.mark.usefixtures("folder")
def test_a_missing_data_set_names_the_variable_of_its_folder(
    document: Document, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    """The error of plan and a line of doctor name JEPA_DATA."""

    def data_check() -> dict[str, str]:
        (check,) = [check for check in document("doctor") if check["what"] == "data"]
        return check

    assert data_check()["found"].endswith("data: 640 images")
    monkeypatch.setenv("JEPA_DATA", str(Path("lost").resolve()))
    assert cli.main(["plan", "ask.yaml"]) == 78
    assert "export JEPA_DATA=" in capsys.readouterr().err
    data = data_check()
    assert data["found"].endswith("lost: missing")
    assert "JEPA_DATA" in data["hint"]


@pytest.mark.usefixtures("folder")
def test_a_preset_that_reads_other_data_than_the_environment_is_refused(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    """Until the sweep file says which of the two."""
    monkeypatch.setenv("JEPA_DATA", str(Path("data").resolve()))
    text = Path("ask.yaml").read_text()
    Path("ask.yaml").write_text(text.replace("data=synthetic", "data=synthetic, runtime=demo"))
    assert cli.main(["plan", "ask.yaml"]) == 78
    err = capsys.readouterr().err
    assert "runtime=demo reads data/demo, but JEPA_DATA=" in err
    assert "ask.yaml:3" in err
    assert "runtime.data_root=data/demo" in err
    text = text.replace("data=synthetic", "data=synthetic, runtime=demo, runtime.data_root=data")
    Path("ask.yaml").write_text(text)
    assert cli.main(["plan", "ask.yaml"]) == 3


def test_masks_show_draws_in_the_terminal_and_to_a_png(
    tmp_path: Path,
    capsys: Capture,
):
    png = tmp_path / "masks.png"
    assert cli.main(["masks", "show", "mask=reference", "mask.targets=2", "--png", str(png)]) == 0
    out = capsys.readouterr().out
    assert "mode reference, 14x14 patches, 2 targets" in out
    assert "P(context) by row" in out
    assert "discarded 0." in out
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 10_000


def test_masks_show_refuses_a_context_size_that_is_too_large(capsys: Capture):
    assert cli.main(["masks", "show", "mask.context_keep=120"]) != 0
    assert "63/89/120 of 196" in capsys.readouterr().err
