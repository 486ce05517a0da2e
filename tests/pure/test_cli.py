"""The command line: instant, documented, and honest to scripts."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import write_json

HEAVY = ("torch", "timm", "mlflow", "webdataset", "hydra", "submitit", "numpy", "rich")
SWEEP = """
question: Does the command line tell the truth?
base: [data=synthetic, optim.batch=32, optim.epochs=2, optim.warmup_epochs=0.2, model.image=96, model.depth=2]
grid:
  model: [vit_ti, vit_s]
  mask.targets: [2, 4]
resources: [{when: "model == 'vit_s'", time: 2h}, {time: 30m}]
limits: {gpu_hours: 100}
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sweep file and a manifest; the root lies in it."""
    fake_trials.data_root(tmp_path / "data")
    (tmp_path / "ask.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JEPA_DATA", raising=False)
    monkeypatch.delenv("JEPA_CLUSTER", raising=False)
    monkeypatch.setenv("JEPA_ROOT", str(tmp_path / "root"))
    return tmp_path


def submitted(desk: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Root, list[str]]:
    """The sweep as if submitted, without anything started."""
    from jepa_cluster.launch.cluster import profile
    from jepa_cluster.launch.submit import documents, plan, submit

    root = Root(desk / "root")
    proposal = plan.make_plan(documents.find_sweep(root, "ask.yaml"), profile.load_profile(), root)
    submit._write_sweep(proposal, "0" * 12)  # pyright: ignore[reportPrivateUsage]
    for name, trial in proposal.trials.items():
        root.trial(name).create(trial.config)
    capsys.readouterr()
    return root, list(proposal.trials)


def document(capsys: pytest.CaptureFixture[str], *words: str) -> object:
    cli.main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_help_imports_nothing_heavy():
    """`jepa --help` must feel instant."""
    code = "import sys\nfrom jepa_cluster.cli import parser\nparser().format_help()\n"
    code += f"print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_verb_and_every_argument_has_help():
    """A verb without a sentence is not finished."""
    (verbs,) = [a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)]  # pyright: ignore
    helps = {c.dest: c.help for c in verbs._choices_actions}  # pyright: ignore
    assert {"plan", "submit", "status", "watch", "logs", "why", "cancel", "retry", "resume", "requeue"} <= set(helps)
    for name, parser in verbs.choices.items():
        assert helps.get(name), name
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), (name, action.dest)  # pyright: ignore


def leaves(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command there is, ('shards', 'build') too -> its parser."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]  # pyright: ignore
    if not inner:
        return {words: parser}
    return {k: v for name, p in inner[0].choices.items() for k, v in leaves(p, (*words, name)).items()}


def test_every_command_prints_its_document_with_json_but_those_that_have_none():
    """ui serves and demo shows what a user would type: neither has a document."""
    found = leaves(cli.parser())
    without = {words for words, p in found.items() if "--json" not in p._option_string_actions}
    assert without == {("ui",), ("demo",)} and len(found) > 30
    page = (Path(__file__).parents[2] / "docs" / "howto" / "sweeps.md").read_text()
    assert all(f"`{words[0]}`" in page for words in without)


def test_every_verb_that_points_at_trials_takes_the_same_words(desk: Path, capsys: pytest.CaptureFixture[str]):
    """An unknown axis is one error with the nearest name, whatever the verb."""
    submitted(desk, capsys)
    verbs = [w[0] for w, p in leaves(cli.parser()).items() if any(a.dest == "selection" for a in p._actions)]
    assert {
        "status",
        "logs",
        "why",
        "cancel",
        "resume",
        "retry",
        "requeue",
        "repro",
        "export",
        "drill",
        "probe",
    } == set(verbs)
    for verb in verbs:
        assert cli.main([verb, "ask", "modle=vit_s"]) == 78, verb
        assert "did you mean 'model'" in capsys.readouterr().err, verb


def test_drill_and_probe_take_a_trial_directory_or_a_sweeps_trials(desk: Path, capsys: pytest.CaptureFixture[str]):
    """By path, by index, by axis; drill takes one, and says how to name it."""
    from jepa_cluster.cli.options import select_trials

    root, names = submitted(desk, capsys)

    def meant(*words: str, alone: str = "") -> list[str]:
        return [t.name for t in select_trials(cli.parser().parse_args(words), alone)]

    assert meant("probe", "ask") == names and meant("probe", "ask.yaml", "model=vit_ti") == names[:2]
    assert meant("drill", "ask", "model=vit_s", "targets=4", alone="drill") == [names[3]]
    assert meant("drill", str(root.trial(names[1]).path), alone="drill") == [names[1]]
    for words, error in (
        (("drill", "ask", "model=vit_ti"), "2 trials match, drill takes one\n  hint:  name it, e.g. jepa drill ask 0"),
        (("probe", str(root.trial(names[1]).path), "seed=0"), "nothing can be selected in one trial: seed=0"),
        (("probe", "root/trials"), "root/trials is no trial directory"),
        (("drill", "asc", "0"), "did you mean 'ask'"),
        (("probe", "ask", "seed=7"), "no trial matches seed=7"),
    ):
        assert cli.main(list(words)) == 78
        told = capsys.readouterr()
        assert error in told.err and not told.out, words


def test_documents_stand_alone_on_stdout(desk: Path, capsys: pytest.CaptureFixture[str]):
    """Whatever else is said goes to stderr."""
    shown = document(capsys, "masks", "show", "mask=reference")
    assert shown["mask"]["mode"] == "reference" and len(shown["p_context"]) == 14  # pyright: ignore
    drawn = document(capsys, "shards", "synthetic", "images", "--train", "16", "--val", "8", "--workers", "1")
    assert drawn == {"folder": "images", "train": 16, "val": 8, "drawn": True}
    built = document(capsys, "shards", "build", "images", "packed", "--workers", "1")
    assert [s["images"] for s in built] == [16, 8]  # pyright: ignore
    assert document(capsys, "shards", "verify", "packed/val") == [{"split": "packed/val", "faults": []}]
    (info,) = document(capsys, "shards", "info", "packed/train")  # pyright: ignore
    assert info["digest"] == built[0]["digest"] and info["mixing"]["global"]["batch"] == 16  # pyright: ignore


def test_logs_have_a_document_but_no_end_of_one(desk: Path, capsys: pytest.CaptureFixture[str]):
    """The last lines by file; --follow goes on for ever, so it has none."""
    root, names = submitted(desk, capsys)
    number = root.trial(names[2]).claim({"launch": "x", "world": 1, "started": 0})
    root.trial(names[2]).logs(number).mkdir(parents=True)
    (root.trial(names[2]).logs(number) / "rank0.out").write_text("one\ntwo\n")
    told = document(capsys, "logs", "ask", "2", "-n", "1")
    assert list(told["files"].values()) == [["two"]] and told["attempt"] == number  # pyright: ignore
    assert cli.main(["logs", "ask", "2", "--json", "--follow"]) == 78 and "no end" in capsys.readouterr().err


def test_every_verb_of_a_sweep_stands_in_its_howto():
    """The page is the reference; a verb that is not there does not exist for a reader."""
    (verbs,) = [a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)]  # pyright: ignore
    page = (Path(__file__).parents[2] / "docs" / "howto" / "sweeps.md").read_text()
    handlers = {name: parser.get_default("run") for name, parser in verbs.choices.items()}
    mine = [
        n for n, h in handlers.items() if h and h.__module__.endswith((".sweeps", ".trials", ".diagnose", ".maintain"))
    ]
    assert len(mine) > 12 and not [n for n in mine if f"jepa {n}" not in page]


def test_plan_changes_nothing_and_its_exit_code_tells_whether_there_is_work(
    desk: Path, capsys: pytest.CaptureFixture[str]
):
    """3 for work; the folder is as it was."""
    before = sorted(desk.rglob("*"))
    assert cli.main(["plan", "ask.yaml", "--points"]) == 3
    out = capsys.readouterr().out
    assert "4 trials: 4 new" in out and "4/4 configs valid" in out and "FLOPs at 30% MFU" in out
    assert sorted(desk.rglob("*")) == before


def test_a_plan_over_its_budget_is_refused(desk: Path, capsys: pytest.CaptureFixture[str]):
    """The limit's line in the file is named, and nothing starts."""
    (desk / "ask.yaml").write_text(SWEEP.replace("gpu_hours: 100", "gpu_hours: 0.001"))
    assert cli.main(["submit", "ask.yaml", "--yes"]) == 78
    assert "ask.yaml:8" in capsys.readouterr().err and not (desk / "root" / "sweeps").exists()


def test_submit_asks_and_takes_no_silence_for_an_answer(desk: Path, capsys: pytest.CaptureFixture[str]):
    """Without a terminal and without --yes nothing is started."""
    assert cli.main(["submit", "ask.yaml"]) == 78
    assert "add --yes" in capsys.readouterr().err and not (desk / "root" / "trials").exists()


def test_status_and_why_read_the_truth_from_the_files(desk: Path, capsys: pytest.CaptureFixture[str]):
    """Markers, spools, attempts: state, step, loss, cause, next command."""
    root, names = submitted(desk, capsys)
    done, failed, stopped, _ = (root.trial(n) for n in names)
    write_json(done.done, {"step": 40, "t": 1, "metrics": {"probe/class_error": 0.25}})
    for trial, cause in ((done, "done"), (failed, "error"), (stopped, "preempted")):
        n = trial.claim({"launch": "x", "world": 2, "host": "n1", "started": 0, "start_step": 0})
        trial.amend(
            n, {"ended": 3_600_000, "end_step": 7, "cause": cause, "error": "CUDA out of memory" * (cause == "error")}
        )
        trial.metrics(n).write_text('{"settled":-1}\n{"step":7,"t":1,"loss":0.5}\n{"step":8,"t":1,"lo')
    write_json(failed.failed, {"cause": "error", "error": "CUDA out of memory", "attempt": 1, "t": 1})
    stopped.stop.touch()
    status = document(capsys, "status", "ask")
    rows = status["trials"]  # pyright: ignore
    assert [r["state"] for r in rows] == ["done", "failed", "stopped", "new"]
    assert [r["step"] for r in rows] == [40, 7, 7, 0] and rows[0]["probe"] == 0.25 and rows[1]["loss"] == 0.5
    assert rows[1]["gpu_hours"] == 2.0
    (why,) = document(capsys, "why", "ask", "state=failed")  # pyright: ignore
    assert why["cause"] == "gpu_oom" and why["hint"].startswith("jepa retry ask 1")
    assert cli.main(["status"]) == 0 and "1 new · 1 stopped · 1 failed · 1 done" in capsys.readouterr().out
    assert cli.main(["why", "ask"]) == 0 and "CUDA out of memory" in capsys.readouterr().out
    assert cli.main(["plan", "ask"]) == 3  # by its name: one is new


def test_an_attempt_that_filled_the_gpu_gets_half_the_micro_batch_and_stays_the_same_trial(desk: Path):
    """Same global batch, same id."""
    from jepa_cluster.launch.cluster import profile
    from jepa_cluster.launch.scheduler import retry_policy
    from jepa_cluster.launch.submit import documents, plan

    root = Root(desk / "root")
    proposal = plan.make_plan(documents.find_sweep(root, "ask.yaml"), profile.load_profile(), root)
    config = next(iter(proposal.trials.values())).config
    full = {"cause": "error", "error": "torch.OutOfMemoryError: CUDA out of memory", "attempt": 1}
    softer = retry_policy.halve_micro_batch(config, [full, full])
    assert softer.runtime.micro_batch == 4 and softer.id == config.id
    assert retry_policy.halve_micro_batch(config, [{"cause": "done", "attempt": 1}]) == config


def test_an_unknown_sweep_or_profile_is_one_clear_error(desk: Path, capsys: pytest.CaptureFixture[str]):
    """What and a hint; no traceback."""
    submitted(desk, capsys)
    for words in (["status", "asc"], ["plan", "nope.yaml"], ["plan", "ask.yaml", "--cluster", "nowhere"]):
        assert cli.main(words) == 78
        err = capsys.readouterr().err
        assert err.startswith("jepa: ") and "Traceback" not in err
    assert cli.main(["status", "asc"]) == 78 and "did you mean 'ask'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("statsu", "jepa: no verb 'statsu': did you mean 'status'? (see jepa --help)\n"),
        ("shards bulid", "jepa shards: no verb 'bulid': did you mean 'build'? (see jepa shards --help)\n"),
        ("weights export a b --to tim", "jepa weights export: --to cannot be 'tim': did you mean 'timm'?"),
        ("why", "jepa why: the following arguments are required: sweep (see"),
    ],
)
def test_a_mistyped_command_is_one_line_with_the_nearest_word(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
):
    """Not the list of all verbs; exit code 2, as everywhere."""
    with pytest.raises(SystemExit) as e:
        cli.main(words.split())
    told = capsys.readouterr().err
    assert e.value.code == 2 and told.startswith(says) and told.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["masks", "show", "mask.targets=0"], "mask.targets=0 is not between 1 and 16"),
        (["masks", "show", "mask.target_scale=[0.2,0.1]"], "hint:  write it as [low, high]"),
        (["masks", "show", "mask.target_scale=0.1"], "mask.target_scale wants [low, high], got 0.1"),
        (["export", "ask", "--out", "t.xlsx"], "name it .csv or .parquet"),
        (["export", "ask", "--curves", "--out", "lost/t.csv"], "cannot use lost/t.csv: No such file or directory"),
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
def test_what_cannot_be_done_is_one_error_with_what_now(
    desk: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
):
    """No traceback, no other file, no silence."""
    submitted(desk, capsys)
    assert cli.main(words) == 78
    told = capsys.readouterr()
    assert says in told.err and told.err.startswith("jepa: ") and not told.out


def test_export_says_what_it_wrote(desk: Path, capsys: pytest.CaptureFixture[str]):
    """Rows and path; without --out the table itself."""
    submitted(desk, capsys)
    assert cli.main(["export", "ask", "--out", "t.csv"]) == 0
    assert capsys.readouterr().out == "4 rows -> t.csv\n"
    assert cli.main(["export", "ask"]) == 0 and capsys.readouterr().out == (desk / "t.csv").read_text()


def test_a_missing_data_set_names_the_variable_that_points_at_it(
    desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """In plan's error, and in a line of the doctor."""

    def data() -> dict[str, str]:
        return next(c for c in document(capsys, "doctor") if c["what"] == "data")  # pyright: ignore

    assert data()["found"].endswith("data: 640 images")
    monkeypatch.setenv("JEPA_DATA", str(desk / "lost"))
    assert cli.main(["plan", "ask.yaml"]) == 78
    assert "export JEPA_DATA=" in capsys.readouterr().err
    assert data()["found"].endswith("lost: missing") and "JEPA_DATA" in data()["hint"]


def test_a_plan_over_its_limit_says_that_submit_will_refuse(desk: Path, capsys: pytest.CaptureFixture[str]):
    """Not a share of many thousand per cent; and what has no GPU costs no GPU-hours."""
    (desk / "ask.yaml").write_text(SWEEP.replace("gpu_hours: 100", "gpu_hours: 0.001"))
    assert cli.main(["plan", "ask.yaml"]) == 3
    told = capsys.readouterr().out
    assert "of 0.001 process-h (over the limit: submit will refuse)" in told and "GPU-h" not in told


def test_status_counts_what_runs_and_says_who_stopped_what(
    desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """An open attempt of a running trial counts up to now, with no heartbeat yet; a dead one to its last row."""
    from jepa_cluster.launch.scheduler import local
    from jepa_cluster.results import tables
    from jepa_cluster.trial.spool import now_ms
    from jepa_cluster.trial.usage import process_seconds

    root, names = submitted(desk, capsys)
    running, stopped = root.trial(names[0]), root.trial(names[1])
    for started in (now_ms() - 7_200_000, now_ms() - 3_600_000):
        n = running.claim({"launch": "x", "world": 2, "started": started})
        running.metrics(n).touch()
    os.utime(running.metrics(1), (0, time.time() - 5_400))
    stopped.stop.write_text("stopped by jepa cancel\n")
    monkeypatch.setattr(
        local, "list_trials", lambda root: dict.fromkeys((names[0], names[2]), local.QueuedTrial("running"))
    )
    assert round(process_seconds(running, running.attempts(), running=True)) == 2 * (1_800 + 3_600)
    os.utime(running.metrics(2), (0, time.time() - 900))
    assert round(process_seconds(running, running.attempts())) == 2 * (1_800 + 2_700)
    assert round(tables.load(root, "ask").trials[0].gpu_hours, 2) == 2.5, "the same by the tables, up to the last row"
    told = document(capsys, "status", "ask")
    rows = told["trials"]  # pyright: ignore
    assert round(rows[0]["gpu_hours"], 2) == 3.0 and rows[2]["note"] == "starting"
    assert rows[1]["note"].startswith("stopped by jepa cancel, ") and told["stopped_cost"] > 0  # pyright: ignore
    assert cli.main(["logs", "ask", "0"]) == 0
    assert "rank 0 of attempt 2 wrote nothing" in capsys.readouterr().out


def test_why_says_the_same_thing_once(desk: Path, capsys: pytest.CaptureFixture[str]):
    """Trials of which the same is told share a block, and one command mends them all."""
    root, names = submitted(desk, capsys)
    for name in names[1:]:
        write_json(root.trial(name).failed, {"cause": "error", "error": "a bug", "attempt": 1, "t": 1})
    assert cli.main(["why", "ask"]) == 0
    told = capsys.readouterr().out
    assert "3 trials: 1 2 3  failed" in told and told.count("a bug") == 1 and "jepa retry ask 1 2 3" in told
    assert "0 vit_ti targets=2 s0  new" in told


def test_masks_show_draws_to_the_terminal_and_to_a_picture(tmp_path, capsys):
    """Pictures, both histograms and the realised fractions in text; the same as a PNG; an impossible K is refused."""
    sheet = tmp_path / "sheet.png"
    assert cli.main(["masks", "show", "mask=reference", "mask.targets=2", "--png", str(sheet)]) == 0
    said = capsys.readouterr().out
    assert "mode reference, 14x14 patches, 2 targets" in said and "P(context) by row" in said and "discarded 0." in said
    assert sheet.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and sheet.stat().st_size > 10_000
    assert cli.main(["masks", "show", "mask.context_keep=120"]) != 0
    assert "63/89/120 of 196" in capsys.readouterr().err


def test_a_plan_refuses_masks_that_cannot_leave_k_patches(desk, capsys):
    """The numbers come at plan time, before anything is queued."""
    (desk / "ask.yaml").write_text(SWEEP.replace("model.depth=2]", "model.depth=2, mask.context_keep=35]"))
    assert cli.main(["plan", "ask.yaml", "--root", str(desk / "root")]) != 0
    assert "mask.context_keep=35: only" in capsys.readouterr().err


def completed(line: str, code: str = "from jepa_cluster.cli import main; main()") -> list[str]:
    """Candidates for the last word of a line, as argcomplete's shell function asks for them: on descriptor 8."""
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:"}
    environment = {**os.environ, **asked, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    words = ["bash", "-c", '"$0" -c "$1" 8>&1 9>&2 1>&2', sys.executable, code]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.split()


def test_the_shell_completes_verbs_options_sweeps_and_what_they_sweep(desk: Path, capsys: pytest.CaptureFixture[str]):
    """By the parser, the root and conf/; bash cuts words at `=`."""
    submitted(desk, capsys)
    assert completed("jepa re") == ["requeue", "resume", "retry", "repro", "report"]
    assert "build" in completed("jepa shards ") and "--shard-mb" in completed("jepa shards build x --")
    assert "--canary" in completed("jepa submit x --c") and completed("jepa status ") == ["ask"]
    assert completed("jepa scaling a") == completed("jepa status --root root a") == ["ask"]
    assert completed("jepa plan --cluster loc") == ["local"] and completed("jepa nodes ") == []
    assert completed("jepa why ask mo") == ["model="] and completed("jepa why ask '!sta") == ["!state="]
    assert sorted(completed("jepa why ask model=vit_")) == ["vit_s", "vit_ti"]
    assert completed("jepa why ask 1 state=fa") == ["failed"]
    assert completed("jepa train mo")[:2] == ["model=", "model.name="] and "vit_l" in completed("jepa train model=")
    assert completed("jepa masks show mask.context_k") == ["mask.context_keep="]


@pytest.mark.parametrize("line", ["jepa sta", "jepa why ask model=", "jepa plan --cluster ", "jepa train model="])
def test_completion_imports_nothing_heavy(desk: Path, capsys: pytest.CaptureFixture[str], line: str):
    """A completion is asked for at every press of a key."""
    submitted(desk, capsys)
    code = "import atexit, sys; from jepa_cluster import cli; import os; leave = os._exit\n"
    code += f"os._exit = lambda code: (print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr), leave(code))\n"
    code += "cli.main()"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    words = ["bash", "-c", '"$0" -c "$1" 8>/dev/null 9>/dev/null', sys.executable, code]
    done = subprocess.run(words, env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_function_of_argcomplete_completes_in_bash(desk: Path, capsys: pytest.CaptureFixture[str]):
    """A real bash, without a terminal: the function is called as readline calls it."""
    submitted(desk, capsys)
    (desk / "jepa").write_text(f'#!/bin/sh\nexec {sys.executable} -m jepa_cluster "$@"\n')
    (desk / "jepa").chmod(0o755)
    register, line = Path(sys.executable).with_name("register-python-argcomplete"), "jepa status ask model=vit_"
    asked = f'PATH={desk}:$PATH; eval "$({register} jepa)"; COMP_LINE="{line}" COMP_POINT={len(line)} COMP_TYPE=9'
    script = f'{asked}; _python_argcomplete jepa; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == ["vit_s", "vit_ti"]


def test_a_root_that_somebody_else_owns_is_one_clear_error():
    """As another user of the machine: what, where, and how to share it."""
    asked = "from pathlib import Path; from jepa_cluster.launch.submit import submit"
    asked += "; from jepa_cluster.trial.directory import Root"
    command = (
        f"{asked}; import os; os.getuid() or os.setuid(65534); submit.locked(Root(Path(os.environ['R']))).__enter__()"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", command],
            env={**os.environ, "R": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    assert "LaunchError: you may not write below this root" in done.stderr and "chmod -R g+ws" in done.stderr
