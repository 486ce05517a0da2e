"""A sweep of four trials for the tests of the command line."""

from dataclasses import dataclass

from jepa_cluster.trial.directory import Root, TrialDir

SWEEP = """
question: Does the command line print the state of the trials?
base: [data=synthetic, optim.batch=32, optim.epochs=2, optim.warmup_epochs=0.2,
       model.image=96, model.depth=2]
grid:
  model: [vit_ti, vit_s]
  mask.targets: [2, 4]
resources: [{when: "model == 'vit_s'", time: 2h}, {time: 30m}]
limits: {gpu_hours: 100}
"""


@dataclass
class Submitted:
    """The root of a submitted sweep, and its trials in the order of the plan."""

    root: Root
    trials: list[TrialDir]
