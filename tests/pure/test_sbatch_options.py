"""What a trial asks of sbatch. The batch scripts themselves: tests/golden."""

from dataclasses import replace
from pathlib import Path

from jepa_cluster.launch.cluster import profile as resources
from jepa_cluster.launch.cluster.profile import ResourceClass
from jepa_cluster.launch.cluster.sbatch_options import sbatch_options, to_cli_options

PROFILE = resources.load_profile(Path("example"))
CLASS = ResourceClass(2, 4, 90)


def test_the_options_of_a_class_are_those_of_its_profile_and_its_shape() -> None:
    """What the profile leaves open is not asked for."""
    assert to_cli_options(sbatch_options(PROFILE, CLASS)) == [
        "--partition=gpu",
        "--time=90",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--cpus-per-task=12",
        "--gpus-per-node=4",
        "--signal=USR2@120",
        "--requeue",
    ]


def test_bad_nodes_are_excluded_besides_those_of_the_profile() -> None:
    profile = replace(PROFILE, exclude="n[1-2]")
    assert sbatch_options(profile, CLASS)["exclude"] == "n[1-2]"
    assert sbatch_options(profile, CLASS, ["n7", "n9"])["exclude"] == "n[1-2],n7,n9"
    assert sbatch_options(PROFILE, CLASS, ["n7"])["exclude"] == "n7"


def test_a_node_without_gpus_is_asked_for_none_and_all_its_memory_for_0() -> None:
    options = sbatch_options(replace(PROFILE, gpus_per_node=0, mem_gb=0), CLASS)
    assert "gpus-per-node" not in options and options["mem"] == 0
    assert sbatch_options(replace(PROFILE, mem_gb=480.5), CLASS)["mem"] == "480.5GB"


def test_the_profiles_own_options_override_the_others() -> None:
    """By sbatch's name or Python's; null takes an option away, true is a flag."""
    own = {"exclusive": True, "mail_type": "FAIL", "time": 5, "partition": None}
    options = sbatch_options(replace(PROFILE, sbatch=own), CLASS)
    assert options["mail-type"] == "FAIL" and options["time"] == 5 and "partition" not in options
    assert "--exclusive" in to_cli_options(options)
