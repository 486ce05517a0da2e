"""The sbatch options of a resource class. The batch scripts are in tests/golden."""

from dataclasses import replace
from pathlib import Path

from jepa_cluster.launch.cluster import profile as resources
from jepa_cluster.launch.cluster.profile import ResourceClass
from jepa_cluster.launch.cluster.sbatch_options import sbatch_options, to_cli_options

PROFILE = resources.load_profile(Path("example"))
CLASS = ResourceClass(2, 4, 90)


def test_the_options_come_from_the_profile_and_the_resource_class() -> None:
    """A setting that the profile does not have gives no option."""
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


def test_no_gpus_are_requested_from_nodes_without_gpus() -> None:
    options = sbatch_options(replace(PROFILE, gpus_per_node=0, mem_gb=0), CLASS)
    assert "gpus-per-node" not in options


def test_memory_0_requests_all_memory_of_a_node() -> None:
    options = sbatch_options(replace(PROFILE, gpus_per_node=0, mem_gb=0), CLASS)
    assert options["mem"] == 0
    assert sbatch_options(replace(PROFILE, mem_gb=480.5), CLASS)["mem"] == "480.5GB"


def test_the_profiles_own_options_override_the_others() -> None:
    """Names have hyphens or underscores. null removes an option, true makes a flag."""
    own = {
        "exclusive": True,
        "mail_type": "FAIL",
        "time": 5,
        "partition": None,
    }
    options = sbatch_options(replace(PROFILE, sbatch=own), CLASS)
    assert options["mail-type"] == "FAIL"
    assert options["time"] == 5
    assert "partition" not in options
    assert "--exclusive" in to_cli_options(options)
