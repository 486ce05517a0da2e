"""The time that Slurm leaves a preempted job, by rows that its programs print."""

import pytest

from jepa_cluster.errors import LaunchError, SchedulerDown
from jepa_cluster.launch.cluster.profile import Profile
from jepa_cluster.launch.scheduler import kill_delay, slurm
from jepa_cluster.launch.scheduler.kill_delay import KillDelay

PARTITIONS = """\
PartitionName=low AllowGroups=ALL Default=YES QoS=N/A GraceTime=120 Hidden=NO PreemptMode=REQUEUE
PartitionName=short AllowGroups=ALL Default=NO QoS=N/A GraceTime=0 Hidden=NO PreemptMode=CANCEL
PartitionName=gang AllowGroups=ALL Default=NO QoS=N/A GraceTime=120 Hidden=NO PreemptMode=SUSPEND
PartitionName=high AllowGroups=ALL Default=NO QoS=N/A GraceTime=0 Hidden=NO PreemptMode=OFF
"""
QOS = "normal|00:00:00|cluster|\nscav|1-00:02:00|requeue|\nurgent|00:00:00|cluster|normal,scav\n"
LOW = KillDelay("REQUEUE", "TERM", 120, "GraceTime of partition low")
SHORT = KillDelay("CANCEL", "TERM", 30, "KillWait")
BY_PARTITION = {"PreemptType": "preempt/partition_prio", "KillWait": "30 sec"}
BY_QOS = {"PreemptType": "preempt/qos", "PreemptMode": "CANCEL", "KillWait": "30 sec"}
BY_QOS["ClusterName"] = "here"
NORMAL = KillDelay("CANCEL", "TERM", 30, "KillWait")
SCAV = KillDelay("REQUEUE", "TERM", 86520, "GraceTime of QOS scav")
# cluster, account, default account, default QOS, allowed ones, partition of an account's jobs
USER = """\
there|other|lab|urgent||
here|lab|lab||normal,scav|
here|other|lab|scav|normal,scav|
here|one|lab||scav|
here|parts|lab||scav|short
here|parts|lab||normal|low
here|parts|lab||urgent|
"""


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"partition": PARTITIONS, "qos": QOS, "user": USER}

    def run(*words: str) -> str:
        return answers[words[words.index("show") + 1]]

    monkeypatch.setattr(slurm, "run_program", run)


@pytest.mark.parametrize(
    ("partition", "expected"),
    [
        (None, LOW),
        ("low", LOW),
        ("short", SHORT),
        ("low,short", SHORT),
        ("gang", None),
        ("high", None),
        ("lo", None),
    ],
)
def test_a_partition_gives_its_grace_time_or_kill_wait(
    partition: str | None, expected: KillDelay | None
):
    """A job that is suspended is not killed."""
    assert kill_delay.read(Profile("slurm", partition=partition), BY_PARTITION) == expected


@pytest.mark.parametrize(
    ("qos", "account", "expected"),
    [
        (None, None, NORMAL),
        ("scav", None, SCAV),
        ("urgent", None, None),
        (None, "other", SCAV),
        ("normal", "other", NORMAL),
        (None, "one", SCAV),
        (None, "parts", NORMAL),
    ],
)
def test_a_qos_gives_its_grace_time_when_another_may_preempt_it(
    qos: str | None, account: str | None, expected: KillDelay | None
):
    """Without one of the profile: the default in the account, else the only one allowed there."""
    profile = Profile("slurm", partition="low", account=account, qos=qos)
    assert kill_delay.read(profile, BY_QOS) == expected


def test_the_user_signal_comes_first_where_slurm_sends_it():
    config = {**BY_PARTITION, "PreemptParameters": "send_user_signal"}
    assert kill_delay.read(Profile("slurm", partition="low"), config) == LOW._replace(signal="USR2")


def test_a_cluster_without_preemption_kills_nobody():
    assert kill_delay.read(Profile("slurm"), {"PreemptType": "preempt/none"}) is None


def test_without_sacctmgr_nothing_is_known_of_a_qos(monkeypatch: pytest.MonkeyPatch):
    def refuse(*words: str) -> str:
        raise (SchedulerDown if words[0] == "sacctmgr" else LaunchError)("no answer")

    monkeypatch.setattr(slurm, "run_program", lambda *w: PARTITIONS if "-o" in w else refuse(*w))
    assert kill_delay.read(Profile("slurm", qos="scav"), BY_QOS) is None
    assert kill_delay.read(Profile("slurm"), BY_QOS) is None


@pytest.mark.parametrize(
    ("delay", "grace", "seconds", "words"),
    [
        (LOW, 60, 60, "a preempted job has 60 s (raise runtime.grace_seconds: Slurm gives 120)"),
        (LOW, 240, 120, "a preempted job has 120 s (GraceTime of partition low)"),
        (None, 60, 60, "a preempted job has 60 s (runtime.grace_seconds)"),
    ],
)
def test_a_trial_has_the_shorter_of_what_slurm_gives_and_what_it_counts_on(
    delay: KillDelay | None, grace: float, seconds: float, words: str
):
    assert kill_delay.usable(delay, grace) == seconds
    assert kill_delay.describe(delay, grace) == words
