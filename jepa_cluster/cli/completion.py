"""`jepa completion bash`: a script for your shell that asks `jepa complete` what may come next.

The answer is made of the parser itself (verbs, options, choices) and of what lies below the root (sweeps, their axes
and values), so nothing is listed twice. Files are left to the shell.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jepa_cluster.cli import Verbs, parser

SCRIPTS = {
    "bash": """\
_jepa() { mapfile -t COMPREPLY < <(jepa complete bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null); \
[[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace; }
complete -o default -F _jepa jepa
""",
    "zsh": """\
#compdef jepa
_jepa() { local -a found; found=("${(@f)$(jepa complete zsh "${BUFFER[1,CURSOR]}" 2>/dev/null)}")
  if [[ -n ${found[1]} ]]; then compadd -S '' -- $found; else _files; fi }
compdef _jepa jepa
""",
    "fish": """\
complete -c jepa -a '(jepa complete fish (commandline -cp) 2>/dev/null)'
""",
}


def add(verbs: Verbs) -> None:
    told = (
        'print what your shell needs to complete verbs, options, sweeps and their axes: eval "$(jepa completion bash)"'
    )
    p = verbs.add_parser("completion", help=told, description=told)
    p.add_argument("shell", choices=list(SCRIPTS), help="whose words are wanted")
    p.set_defaults(run=script)
    p = verbs.add_parser("complete", help="what may come next on a command line; called by your shell")
    p.add_argument("shell", choices=list(SCRIPTS), help="whose words are wanted")
    p.add_argument("line", help="the command line up to the cursor")
    p.set_defaults(run=complete)


def script(a: argparse.Namespace) -> int:
    print(SCRIPTS[a.shell], end="")
    return 0


def complete(a: argparse.Namespace) -> int:
    try:
        words = shlex.split(a.line)
    except ValueError:  # an open quote
        words = shlex.split(a.line.replace("'", "").replace('"', ""))
    if not a.line or a.line[-1].isspace():
        words.append("")
    found = candidates(words[1:])
    if a.shell == "bash" and "=" in words[-1]:  # bash cuts words there
        found = [f.partition("=")[2] for f in found]
    for word in found:
        print(word)
    return 0


def candidates(words: list[str]) -> list[str]:
    """Words after `jepa`, the last one unfinished -> what it may become."""
    (verbs,) = (x for x in parser()._actions if isinstance(x, argparse._SubParsersAction))  # pyright: ignore[reportPrivateUsage]
    choices: dict[str, argparse.ArgumentParser] = verbs.choices
    *before, last = words or [""]
    if not before:
        return _beginning(last, (v for v in choices if v != "complete"))
    if before[0] not in choices:
        return []
    actions: list[Any] = choices[before[0]]._actions  # pyright: ignore[reportPrivateUsage]
    while inner := next((x.choices[before[1]] for x in actions if before[1:] and before[1] in _inner(x)), None):
        before, actions = before[1:], inner._actions
    if last.startswith("-"):
        return _beginning(last, (o for x in actions for o in x.option_strings if o.startswith("--")))
    option = next((x for x in actions if before[-1] in x.option_strings and x.nargs != 0), None)
    if option is not None:
        return _beginning(last, _profiles() if "--cluster" in option.option_strings else option.choices or ())
    places = [x for x in actions if not x.option_strings]
    given = _positional(before[1:], actions)
    if not places or (len(given) >= len(places) and places[-1].nargs != "*"):
        return []
    place = places[min(len(given), len(places) - 1)]
    if place.dest == "sweep":
        return _beginning(last, _root(before).sweeps())
    if place.dest in ("override", "overrides"):
        return _override(last)
    if place.dest == "selection":
        return _selection(last, _root(before).sweep(Path(given[0]).stem))
    return _beginning(last, place.choices or ())


def _inner(action: Any) -> Iterable[str]:
    """The commands inside a command, as those of `jepa shards`."""
    return action.choices if isinstance(action, argparse._SubParsersAction) else ()  # pyright: ignore[reportPrivateUsage]


def _positional(words: list[str], actions: list[Any]) -> list[str]:
    """The words that are no option and no option's value."""
    taking = {o for x in actions for o in x.option_strings if x.nargs != 0}
    return [w for w, b in zip(words, ["", *words], strict=False) if not w.startswith("-") and b not in taking]


def _selection(last: str, sweep: Path) -> list[str]:
    """`state=`, an axis, or a value of one, as far as it is typed; '!' in front takes away."""
    from jepa_cluster.sweep.definition import label
    from jepa_cluster.sweep.reconcile import STATES
    from jepa_cluster.trial.layout import read_json

    trials: list[dict[str, Any]] = (read_json(sweep / "plan.json") or {}).get("trials", [])
    values: dict[str, dict[str, None]] = {"state": dict.fromkeys(STATES), "seed": {}, "class": {}}
    for t in trials:
        for key, value in {**t["point"], "seed": t["seed"], "class": t["class"]}.items():
            values.setdefault(key, {})[label(value)] = None
    away = "!" if last.startswith("!") else ""
    key, given, _ = last.removeprefix("!").partition("=")
    if not given:
        return _beginning(last, (f"{away}{k}=" for k in values))
    return _beginning(last, (f"{away}{key}={v}" for v in values.get(key, {})))


def _override(last: str) -> list[str]:
    """`model=`, a group's choices, or a setting, as far as it is typed."""
    from jepa_cluster.config import Recipe, Runtime, settings
    from jepa_cluster.sweep.resolve import conf_dir

    group, given, _ = last.partition("=")
    folders = sorted(f for f in conf_dir().iterdir() if any(f.glob("*.yaml")))
    if given:
        return _beginning(
            last, (f"{group}={p.stem}" for f in folders if f.name == group for p in sorted(f.glob("*.yaml")))
        )
    return _beginning(
        last, (f"{name}=" for name in (*(f.name for f in folders), *settings(Recipe), *settings(Runtime, "runtime")))
    )


def _beginning(last: str, words: Iterable[str]) -> list[str]:
    return [w for w in words if w.startswith(last)]


def _root(before: list[str]) -> Any:
    from jepa_cluster.trial.layout import Root, default_root

    at = before.index("--root") + 1 if "--root" in before else 0
    return Root(Path(before[at])) if 0 < at < len(before) else default_root()


def _profiles() -> list[str]:
    from jepa_cluster.launch.resources import shipped

    return sorted(p.stem for folder in shipped() for p in folder.glob("*.yaml"))
