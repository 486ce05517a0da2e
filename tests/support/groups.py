"""Groups of test files for pytest-xdist: one process runs a group and shares its fixtures."""

from pathlib import PurePath

from xdist.scheduler import LoadScopeScheduling

GROUPS = {  # longest first; any other file is a group of its own
    "slurm scenarios": (
        "test_array_faults",
        "test_hydra_app",
        "test_slow_faults",
        "test_sweep",
        "test_trainer_faults",
        "test_transcripts",
    ),
    "slurm canaries": ("test_canary",),
    "slurm": ("test_doctor_on_slurm", "test_submit_on_slurm", "test_testcluster"),
    "two nodes": ("test_save_faults", "test_save_faults_slow"),
    "ranks": (
        "test_chaos",
        "test_checkpoint",
        "test_disk",
        "test_diverging_run",
        "test_hang",
        "test_mup_ranks",
        "test_resume",
        "test_sharding",
        "test_start_checkpoint",
        "test_step_metrics",
        "test_training_commands",
    ),
    "browser": ("test_pages",),
    "servers": ("test_tracking_faults",),
}
GROUP_OF_FILE = {file: name for name, files in GROUPS.items() for file in files}


def group(nodeid: str) -> str:
    """The group of a test."""
    file = PurePath(nodeid.split("::")[0]).stem
    return GROUP_OF_FILE.get(file, file)


def rank(nodeid: str) -> int:
    """The place of a test's group in the order of the groups."""
    names = list(GROUPS)
    name = group(nodeid)
    return names.index(name) if name in names else len(names)


class GroupScheduling(LoadScopeScheduling):
    """Hands out whole groups."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
