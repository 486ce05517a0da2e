"""Checkpoints that stay, as MLflow's LoggedModels: where each lies and what it measured. No weights are sent.

In: a trial's run and the steps whose checkpoints are kept for ever (the last one, milestones). Out: one READY model
a checkpoint, linked to the run, with the run's probes and validation losses of that step as its metrics. A model is
found by trial and step before it is made and READY last, so a collector killed anywhere finishes it next time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from jepa_cluster.config import TrialConfig
from jepa_cluster.tracking import remote
from jepa_cluster.trial import spool
from jepa_cluster.trial.layout import TrialDir, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

MEASURED = ("probe/", "val/", "loss", "flops_total", "images_seen")


def kept(trial: TrialDir, config: TrialConfig, settled: int) -> list[int]:
    """Steps of committed checkpoints that no retention removes: a finished trial's last, and its milestones."""
    done = read_json(trial.done)
    last = int(done.get("step", -1)) if done else -1
    every = config.runtime.milestone_every
    return [s for s in trial.committed() if s <= settled and (s == last or (every > 0 and s > 0 and s % every == 0))]


class Models:
    """The models of one experiment, read once when the first checkpoint is to be registered."""

    def __init__(self, client: MlflowClient, experiment: str) -> None:
        self.client, self.experiment = client, experiment
        self._known: dict[tuple[str, int], LoggedModel] = {}
        for model in self._search():
            key = model.tags.get("jepa.trial", ""), int(model.tags.get("jepa.step", -1))
            first = self._known.setdefault(key, model)
            if first is not model and key[0]:  # a lost answer's twin
                client.delete_logged_model(model.model_id)

    def register(self, run: remote.Remote, trial: TrialDir, config: TrialConfig, steps: Sequence[int]) -> None:
        """Make or finish the model of each step. Those that are READY cost nothing."""
        rows: Mapping[int, spool.Row] | None = None
        for step in steps:
            model = self._known.get((trial.name, step))
            if model is not None and model.status == "READY" and model.source_run_id == run.run_id:
                continue
            rows = {r.step: r for r in spool.read(trial).settled_rows} if rows is None else rows
            self._known[trial.name, step] = self._finish(run, trial, config, step, model, rows.get(step))

    def _finish(
        self,
        run: remote.Remote,
        trial: TrialDir,
        config: TrialConfig,
        step: int,
        model: LoggedModel | None,
        row: spool.Row | None,
    ) -> LoggedModel:
        from mlflow.entities import LoggedModelOutput, Metric

        if model is not None and model.source_run_id != run.run_id:  # of a run that a person deleted
            self.client.delete_logged_model(model.model_id)
            model = None
        if model is None:
            folder = trial.checkpoint(step)
            model = self.client.create_logged_model(
                self.experiment,
                name=f"{config.recipe.model.name} {config.id[:12]} step {step}".replace(".", "_"),
                source_run_id=run.run_id,
                tags={"jepa.trial": trial.name, "jepa.step": str(step), "jepa.checkpoint": str(folder)},
                params={"checkpoint": str(folder), "model.name": config.recipe.model.name, "step": str(step)},
                model_type="I-JEPA",
            )
        measured = [(k, v) for k, v in (row.values if row else {}).items() if k.startswith(MEASURED)]
        if row and measured:  # the run's own points once more, so the run gains none; the model learns them
            points = [Metric(remote.name(k), v, row.t, step, model.model_id, run_id=run.run_id) for k, v in measured]
            self.client.log_batch(run.run_id, metrics=points)
        outputs = self.client.get_run(run.run_id).outputs
        if model.model_id not in {m.model_id for m in (outputs.model_outputs if outputs else ())}:
            self.client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step)])
        return self.client.finalize_logged_model(model.model_id, "READY")

    def _search(self) -> Iterator[LoggedModel]:
        token: str | None = None
        order = [{"field_name": "creation_timestamp", "ascending": True}]
        while True:
            page = self.client.search_logged_models([self.experiment], order_by=order, page_token=token)
            yield from page
            token = page.token
            if not token:
                return
