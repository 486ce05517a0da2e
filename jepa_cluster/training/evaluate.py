"""Probes that cost minutes, for a trial that is done or on its way: `jepa probe <trial>`.

In: a trial directory with a checkpoint. Out: the accuracy of a logistic probe on 1 % of the labels
and of an attentive probe on all of them, both on the frozen target encoder. One process; nothing is
written to the trial.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_cluster.config import TrialConfig
from jepa_cluster.data.pipeline import labelled, normalise
from jepa_cluster.errors import DataError
from jepa_cluster.ijepa.objective import IJepa
from jepa_cluster.training import checkpoint
from jepa_cluster.training.distributed import named_tensors
from jepa_cluster.trial.layout import TrialDir

BATCH = 64
LABEL_FRACTION = 0.01  # of the labels, the same number of each class
WEIGHT_DECAYS = (
    1e-5,
    1e-4,
    1e-3,
    1e-2,
    1e-1,
)  # of the logistic probe, chosen on the other half of these labels
EPOCHS, RATE = 20, 1e-3  # of the attentive probe


def load_target_encoder(
    trial: TrialDir, config: TrialConfig, device: torch.device
) -> tuple[nn.Module, int]:
    """The target encoder of the newest checkpoint, and its step.

    Raises CheckpointError when there is none.
    """
    step, stored = checkpoint.load_latest(trial)
    with torch.device("meta"):
        model = IJepa(config.recipe)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            tensor.copy_(stored[f"model.{name}"])
    return model.target.eval().requires_grad_(False), step


def encode_split(
    target: nn.Module, config: TrialConfig, split: str, limit: int | None
) -> tuple[Tensor, Tensor]:
    """Output patches float16 [n, N, D] and classes [n] of a split."""
    device = next(target.parameters()).device
    found: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for images, labels, _ in labelled(config, split, limit, 0, 1, BATCH):
            if "class" not in labels:
                raise DataError(
                    "the probe wants classes, the shards have none", where=config.runtime.data_root
                )
            pixels = normalise(images.to(device), config.recipe.data)
            found.append((target(pixels).half().cpu(), labels["class"].long()))
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def stratified_subset(labels: Tensor, share: float) -> Tensor:
    """Indices of a share of the images, at least two of each class, the same ones every time."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    each = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([e[: max(2, round(share * len(e)))] for e in each])


def logistic(x: Tensor, y: Tensor, decay: float, classes: int) -> nn.Linear:
    """Multinomial logistic regression by L-BFGS on standardised features."""
    probe = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    solver = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(probe(x), y) + decay * probe.weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)  # pyright: ignore[reportArgumentType]
    return probe


class AttentiveProbe(nn.Module):
    """One learned query attends over the patches; a linear layer names the class."""

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(
            torch.randn(1, 1, width, generator=torch.Generator().manual_seed(0)) * 0.02
        )
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Patches [b, N, D] -> logits [b, classes]."""
        x = self.norm(x)
        return self.head(
            self.attend(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0][:, 0]
        )


def attentive(x: Tensor, y: Tensor, heads: int, classes: int) -> AttentiveProbe:
    torch.manual_seed(0)
    probe = AttentiveProbe(x.shape[2], heads, classes)
    steps = EPOCHS * -(-len(x) // BATCH)
    solver = torch.optim.AdamW(probe.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(solver, RATE, total_steps=steps)
    for _, chosen in zip(range(steps), _shuffled(len(x)), strict=False):
        loss = F.cross_entropy(probe(x[chosen].float()), y[chosen])
        solver.zero_grad()
        loss.backward()
        solver.step()
        schedule.step()
    return probe


def _shuffled(n: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(n, generator=generator).split(BATCH)


def evaluate(trial: TrialDir, limit: int | None) -> dict[str, float]:
    """{"step", "logistic_1pct_top1", "attentive_top1"} on the validation split.

    limit: training images looked at.
    """
    config = trial.read_config()
    device = torch.device(
        "cuda" if torch.cuda.is_available() and config.runtime.device != "cpu" else "cpu"
    )
    config = replace(
        config,
        runtime=replace(
            config.runtime, workers=0 if device.type == "cpu" else config.runtime.workers
        ),
    )
    target, step = load_target_encoder(trial, config, device)
    x, y = encode_split(target, config, "train", limit)
    test, truth = encode_split(target, config, "val", limit)
    classes = int(max(y.max(), truth.max())) + 1
    pooled, pooled_test = x.float().mean(1), test.float().mean(1)
    chosen = stratified_subset(y, LABEL_FRACTION)
    mean, deviation = pooled.mean(0), pooled.std(0) + 1e-6
    fitted = (pooled[chosen] - mean) / deviation
    half, other = (
        slice(0, None, 2),
        slice(1, None, 2),
    )  # of every class, since `few` lists them class by class
    scores = []
    for decay in WEIGHT_DECAYS:
        tried = logistic(fitted[half], y[chosen][half], decay, classes)
        scores.append(float((tried(fitted[other]).argmax(1) == y[chosen][other]).float().mean()))
    best = logistic(fitted, y[chosen], WEIGHT_DECAYS[scores.index(max(scores))], classes)
    answer = best((pooled_test - mean) / deviation).argmax(1)
    pool = attentive(x, y, config.recipe.model.heads, classes).eval()
    with torch.no_grad():
        looked = torch.cat([pool(part.float()).argmax(1) for part in test.split(BATCH)])
    return {
        "step": step,
        "logistic_1pct_top1": float((answer == truth).float().mean()),
        "attentive_top1": float((looked == truth).float().mean()),
    }
