"""Cluster profiles: what is read, what is refused, and the names of resource classes."""

from pathlib import Path

import pytest

from jepa_cluster.errors import SweepFileError
from jepa_cluster.launch.cluster import profile
from jepa_cluster.launch.cluster.profile import ResourceClass, class_letters, load_profile
from jepa_cluster.sweep import sweep_file


def test_auto_is_replaced_by_what_this_machine_has(monkeypatch: pytest.MonkeyPatch):
    """A given number stays; without GPUs the cores are the slots."""
    monkeypatch.setattr(profile, "visible_gpus", lambda: ("0", "1", "2"))
    found = load_profile(Path("local"))
    assert found.slots == 3
    assert found.gpus_per_node == 3
    assert found.unit == "GPU-h"
    monkeypatch.setattr(profile, "visible_gpus", lambda: ())
    found = load_profile(Path("local"))
    assert found.gpus_per_node == 0
    assert found.unit == "process-h"
    assert found.slots >= 1


def test_a_cluster_with_gpus_never_trains_on_a_cpu(tmp_path: Path):
    """Unless the profile asks for it: the GPUs of the test cluster are fake."""
    file = tmp_path / "mine.yaml"
    for text, device in (
        ("gpus_per_node: 8", "cuda"),
        ("gpus_per_node: 8\nruntime: {device: cpu}", "cpu"),
        ("gpus_per_node: 0", None),
    ):
        file.write_text(f"kind: slurm\n{text}")
        assert load_profile(file).runtime.get("device") == device


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: slurm\nfile: x", "'file' cannot be set"),
        ("kind: slurm\ntime: soon", "time wants 30m"),
        ("kind: slurm\nslots: 0", "slots wants a positive number"),
        ("kind: slurm\nmfu: 1.5", "mfu=1.5 must be inside"),
        ("kind: slurm\npartitoin: gpu", "did you mean 'partition'"),
        ("kind: slurm\nsbatch: {time: 5}", "sbatch: time would override `time`"),
        ("kind: slurm\nqos: a\nsbatch: {qos: b}", "sbatch: qos would override `qos`"),
        ("kind: slurm\nmem_gb: 9\nsbatch: {mem-per-gpu: 4G}", "would override `mem_gb`"),
        ("kind: slurm\nmem_gb: 9\nsbatch: {mem_per_cpu: 4G}", "would override `mem_gb`"),
        ("kind: slurm\nsbatch: {gpus-per-node: 'a100:2'}", "would override `gpus_per_node`"),
        ("kind: slurm\nsbatch: {clusters: a}", "sbatch: clusters cannot be set"),
        (
            "kind: slurm\ngpus_per_node: 8\nsbatch: {gres: 'gpu:2'}",
            "sbatch: gres says 2, gpus_per_node says 8",
        ),
        ("kind: pbs", "kind wants one of slurm, local"),
    ],
)
def test_a_wrong_profile_is_refused_with_file_and_reason(tmp_path: Path, text: str, message: str):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SweepFileError) as error:
        load_profile(file)
    assert message in str(error.value)
    assert "mine.yaml" in error.value.where


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("90", 90),
        ("90:30", 91),
        ("12:30:01", 751),
        ("2-6", 3240),
        ("2-6:30", 3270),
        ("1-12:00:00", 2160),
        ("1-0:0:1", 1441),
        ("1d12h", 2160),
        ("30m", 30),
    ],
)
def test_times_are_those_of_slurm_in_profile_and_sweep(tmp_path: Path, time: str, minutes: int):
    file = tmp_path / "mine.yaml"
    file.write_text(f"kind: slurm\ntime: {time}")
    assert load_profile(file).minutes == minutes
    file.write_text(f"question: Q\ngrid: {{model: [vit_s]}}\nresources: [{{time: {time}}}]")
    (request,) = sweep_file.load(file).resources
    assert request.minutes == minutes


def test_a_home_folder_in_python_is_expanded(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("kind: slurm\npython: ~/venv/bin/python\npartition: null")
    assert load_profile(file).python == str(Path.home() / "venv/bin/python")


def test_an_unknown_profile_is_refused_with_the_nearest_name(tmp_path: Path):
    with pytest.raises(SweepFileError, match="did you mean 'example'"):
        load_profile(Path("exampel"))
    (tmp_path / "cluster.yaml").write_text("kind: slurm")
    with pytest.raises(SweepFileError, match="did you mean 'cluster'"):
        load_profile(tmp_path / "clustre.yaml")


def test_cuda_visible_devices_names_the_gpus(monkeypatch: pytest.MonkeyPatch):
    for value, names in (("0,3", ("0", "3")), ("", ()), ("-1", ())):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert profile.visible_gpus.__wrapped__() == names


def test_classes_are_named_from_the_smallest_on():
    classes = [ResourceClass(nodes, 8, 60) for nodes in range(28, 0, -1)]
    letters = class_letters(classes)
    assert letters[classes[-1]] == "A"
    assert letters[classes[2]] == "Z"
    assert letters[classes[1]] == "Z1"
    assert letters[classes[0]] == "Z2"
