"""What users wrote is text: in terminals, errors, figures and Markdown."""

import io
import json
from pathlib import Path

import pytest
from support import fake_trials
from support.submitted_sweep import Submitted

from jepa_cluster import cli, labels
from jepa_cluster.cli import terminal
from jepa_cluster.errors import JepaError, printable
from jepa_cluster.report import analysis, figure, markdown
from jepa_cluster.results import tables
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import write_json

HOSTILE = "\x1b[31m[/foo] [bold]x[/bold] :smile: \x1b]0;title\x07$2/h … $4/h\x9b2J \r"
SHOWN = "[/foo] [bold]x[/bold] :smile: ]0;title$2/h … $4/h"


@pytest.fixture
def hostile(submitted: Submitted) -> Submitted:
    """The sweep ask with a question, and an error, that hold markup and control sequences."""
    path = submitted.root.sweep("ask").plan
    write_json(path, {**json.loads(path.read_text()), "question": HOSTILE})
    trial = submitted.trials[0]
    number = trial.claim({"code": HOSTILE})
    trial.amend(number, {"ended": 1, "cause": "error", "error": HOSTILE})
    write_json(trial.failed, {"cause": "error", "error": HOSTILE, "attempt": number, "t": 1})
    return submitted


@pytest.mark.parametrize("verb", ["status", "status ask", "why ask", "repro ask 0"])
def test_a_question_or_an_error_does_not_break_or_steer_the_terminal(
    hostile: Submitted, capsys: pytest.CaptureFixture[str], verb: str
):
    """Markup in it is printed, and control sequences are left out."""
    assert cli.main(verb.split()) == 0
    out = capsys.readouterr().out
    assert printable(out) == out
    assert "[/foo] [bold]x[/bold] :smile:" in out


def test_on_a_terminal_colours_are_ours_alone(monkeypatch: pytest.MonkeyPatch):
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Tty()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal.show(terminal.Text(f"green {HOSTILE}", style="green"))
    assert out.getvalue() == f"\x1b[32mgreen {SHOWN} \x1b[0m\n"


def test_an_error_holds_no_control_sequence():
    error = JepaError(HOSTILE, where="\x1bc", hint="a\nb\tc")
    assert str(error) == f"{SHOWN} \n  where: c\n  hint:  a\nb\tc"


def test_dollars_in_a_question_and_a_setting_are_drawn(tmp_path: Path):
    """matplotlib reads text between two dollars as math, and `$2/h … $4/h` is none."""
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root, models=("vit_a",)):
        fake_trials.run(trial)
    plan = root.sweep("demo").plan
    text = plan.read_text().replace("Do stubs scale?", r"$2/h $\\frac{ $4/h")
    plan.write_text(text.replace('"vit_a"', '"$a^$"'))
    study = analysis.analyse(tables.load(root, "demo"))
    figure.draw(study, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()
    page = markdown.write(study, tmp_path).read_text()
    assert page.startswith(r"# \$2/h \$\\frac{ \$4/h")


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("mask_scale at 0.5", "mask_scale at 0.5"),
        ("[a](b) *c* _d_ <e> |f| `g` ~h~", r"\[a\](b) \*c\* \_d\_ \<e\> \|f\| \`g\` \~h\~"),
        ("# $2 & $4 \\", r"\# \$2 \& \$4 " + "\\\\"),
    ],
)
def test_markdown_is_escaped_where_it_would_have_an_effect(text: str, escaped: str):
    assert labels.markdown(text) == escaped
