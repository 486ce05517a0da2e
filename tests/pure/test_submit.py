"""`jepa submit`: directories of trials that several sweeps have."""

import pytest
from support.submitted_sweep import SWEEP, Submitted

from jepa_cluster.errors import LaunchError
from jepa_cluster.launch.cluster.profile import load_profile
from jepa_cluster.launch.submit import submit
from jepa_cluster.launch.submit.plan import Plan, make_plan
from jepa_cluster.sweep import sweep_file, yaml_source
from jepa_cluster.trial.directory import Root

# One trial of SWEEP, by other axes.
OTHER = SWEEP.replace("model: [vit_ti, vit_s]", "model: [vit_ti]").replace(
    "mask.targets: [2, 4]", "optim.batch: [32]\n  mask.targets: [2]"
)


def plan_of(text: str, name: str, root: Root) -> Plan:
    sweep = sweep_file.from_source(yaml_source.parse(text, f"{name}.yaml"), name)
    return make_plan(sweep, load_profile(), root)


def test_a_directory_is_named_by_the_axes_of_the_sweep_that_made_it(submitted: Submitted):
    """Another sweep finds it by the identity of the trial."""
    first = submitted.trials[0]
    assert first.name.startswith("vit_ti-targets2-s0-")
    other = plan_of(OTHER, "other", submitted.root)
    assert list(other.trials) == [first.name]
    alone = plan_of(OTHER, "other", Root(submitted.root.path / "alone"))
    (name,) = alone.trials
    assert name == first.name.replace("-targets2", "-batch32-targets2")


def test_two_submits_at_once_never_make_two_directories_of_one_trial(submitted: Submitted):
    """The second one has planned before the first one made the directory."""
    root = Root(submitted.root.path / "alone")
    late = plan_of(OTHER, "other", root)
    first = submitted.trials[0]
    root.trials.mkdir(parents=True)
    first.path.rename(root.trial(first.name).path)
    with pytest.raises(LaunchError, match="another submit has just made the directory"):
        submit.submit(late)
    assert list(root.names_by_id().values()) == [first.name]
