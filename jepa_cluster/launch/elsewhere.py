"""Back to the queue, but not to the machine that failed: what a job does about a node, at once and by itself.

In: a trial and the environment of its job. Out: a longer list of excluded nodes, of the trial's own job once that waits
again, of all that waits of its sweep once the ledger calls the node bad, and of what is submitted later. What Slurm
refuses stands in the attempt's record, and everything goes on as without. A job that is given the same machine a third
time hands it back unused.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jepa_cluster.errors import JepaError
from jepa_cluster.launch import explain, failures, queue, slurm
from jepa_cluster.launch.slurm import Wish
from jepa_cluster.training import preemption
from jepa_cluster.trial.layout import Root, TrialDir

if TYPE_CHECKING:
    from jepa_cluster.launch.resources import Profile

FULL = "too few nodes would be left"
SHARE = 4  # one in so many of a partition's usable nodes may be excluded for a trial, and one always may
SILENT = 2  # attempts in a row that ended on one node without a word, until that speaks against it
PATIENCE = 5.0  # s in which Slurm must have taken the list: we are about to be killed

Attempt = Mapping[str, Any]


def suspects(attempts: Sequence[Attempt]) -> list[str]:
    """The node that the newest end speaks against; [] for most ends, and where nobody can tell which node it was."""
    last = attempts[-1] if attempts else {"forgiven": True}
    if last.get("forgiven"):
        return []
    if "ended" in last:
        rule = failures.of_attempt(last).rule
        found = explain.accused(last) if rule.elsewhere else []
        return found if len(found) == 1 else []
    silent = [explain.hosts(a) for a in attempts[-SILENT:] if "ended" not in a]
    return silent[0] if silent == [silent[0]] * SILENT and len(silent[0]) == 1 else []


def allowed(nodes: Iterable[str], excluded: Iterable[str], usable: Iterable[str], wants: int, ours: int) -> list[str]:
    """Those of `nodes` that may be excluded too. ours: how many we have excluded before; wants: nodes a trial needs.

    Never more than a share of the usable nodes, and never so many that the trial could not run.
    """
    left, room = set(usable) - set(excluded), max(1, len(set(usable)) // SHARE) - ours
    found = [n for n in nodes if n not in set(excluded)][: max(room, 0)]
    while found and len(left - set(found)) < wants:
        found.pop()
    return found


def keep_away(trial: TrialDir, job: str) -> None:
    """Called when our own job has gone back to the queue: see to it that it does not come back to the same node."""
    try:
        attempts = trial.attempts()
        nodes = suspects(attempts)
        if not nodes or _tried(attempts[-1]):
            return
        trial.amend(attempts[-1]["attempt"], _keep_one_away(job, nodes, _ours(attempts)))
        bad = explain.bad_nodes(trial.root)
        if nodes[0] in bad:
            _keep_all_away(trial, nodes, bad)
    except (JepaError, OSError) as e:
        print(f"elsewhere: {e}", file=sys.stderr, flush=True)


def handed_back(trial: TrialDir, env: Mapping[str, str]) -> bool:
    """Whether this allocation has gone back to the queue before anything began: it is on the node that just failed."""
    attempts = trial.attempts()
    nodes = suspects(attempts)
    here = explain.expand(env.get("SLURM_JOB_NODELIST", ""))
    if not nodes or nodes[0] not in here or _tried(attempts[-1]) or not shutil.which("scontrol"):
        return False
    try:
        room = [w for w in slurm.wishes("-j", preemption.own_job(env)) if _more(w, nodes, _ours(attempts))]
    except JepaError as e:
        print(f"elsewhere: {e}", file=sys.stderr, flush=True)
        return False
    if not room:
        trial.amend(attempts[-1]["attempt"], _refused(nodes, FULL))
    return bool(room) and preemption.go_back_to_queue(env, PATIENCE)


def at_submission(root: Root, profile: Profile, wants: int) -> list[str]:
    """What a new array leaves out: what its profile says, and the worst of the ledger's bad nodes."""
    before, bad = [profile.exclude] if profile.exclude else [], explain.bad_nodes(root)
    usable = slurm.usable(profile.partition or "") if bad else ()
    return [*before, *allowed(bad, explain.expand(profile.exclude or ""), usable, wants, 0)]


def for_successor(trial: TrialDir, wish: Wish) -> list[str]:
    """The nodes that the job which follows us has to leave out, those of `wish` among them."""
    attempts = trial.attempts()
    before, nodes = explain.expand(wish.excluded), suspects(attempts)
    try:
        found = _more(wish, nodes, _ours(attempts)) if nodes else []
    except JepaError as e:
        trial.amend(attempts[-1]["attempt"], _refused(nodes, e.what))
        return before
    if found:
        trial.amend(attempts[-1]["attempt"], {"excluded": found})
    return [*before, *found]


def _keep_one_away(job: str, nodes: Sequence[str], ours: int) -> dict[str, Any]:
    """-> what the attempt's record is to say."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            wish = slurm.wishes("-j", job)[0]
            found = _more(wish, nodes, ours)
            if not found:
                return _refused(nodes, FULL)
            slurm.exclude([wish.id], [*explain.expand(wish.excluded), *found])
            return {"excluded": found}
        except (JepaError, IndexError) as e:
            if time.monotonic() > end:
                return _refused(nodes, str(e))
            time.sleep(0.5)


def _keep_all_away(trial: TrialDir, nodes: Sequence[str], bad: Sequence[str]) -> None:
    """The tasks of the trial's sweeps that wait need not find out for themselves."""
    records = queue.array_records(trial.root)
    sweeps = {r["sweep"] for r in records if trial.name in r["trials"]}
    names = [r["name"] for r in records if r["sweep"] in sweeps]
    waiting = slurm.wishes("-t", "pending", "--name", ",".join(names)) if names else []
    usable = {partition: slurm.usable(partition) for partition in {w.partition for w in waiting}}
    together: dict[tuple[str, ...], list[str]] = {}
    for wish in waiting:
        before = explain.expand(wish.excluded)
        found = allowed(nodes, before, usable[wish.partition], wish.nodes, len(set(before) & set(bad)))
        if found:
            together.setdefault((*before, *found), []).append(wish.id)
    for excluded, tasks in together.items():
        slurm.exclude(tasks, excluded)


def _more(wish: Wish, nodes: Iterable[str], ours: int) -> list[str]:
    return allowed(nodes, explain.expand(wish.excluded), slurm.usable(wish.partition), wish.nodes, ours)


def _ours(attempts: Sequence[Attempt]) -> int:
    """How many nodes this trial has been kept away from before."""
    return len({node for a in attempts for node in a.get("excluded", ())})


def _tried(attempt: Attempt) -> bool:
    return "excluded" in attempt or "exclude_refused" in attempt


def _refused(nodes: Sequence[str], why: str) -> dict[str, Any]:
    return {"exclude_refused": f"{nodes[0]}: {' '.join(why.split())}"}
