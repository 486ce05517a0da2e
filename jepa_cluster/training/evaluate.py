"""Probes that cost minutes, for a trial that is done or on its way: `jepa probe <trial>`.

In: a trial directory with a checkpoint. Out: the accuracy of a logistic probe on 1 % of the labels
and of an attentive probe on all of them, both on the frozen target encoder. One process; nothing is
written to the trial.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_cluster.config import TrialConfig
from jepa_cluster.data.pipeline import labelled, normalise
from jepa_cluster.errors import DataError
from jepa_cluster.ijepa.objective import IJepa
from jepa_cluster.training import trial_weights
from jepa_cluster.training.linear_probes import stratified_subset
from jepa_cluster.trial.directory import TrialDir

BATCH = 64
LABEL_FRACTION = 0.01  # the same number of each class
# Of the logistic probe, chosen on one half of these labels after a fit on the other.
WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
EPOCHS = 20  # of the attentive probe
LEARNING_RATE = 1e-3


def load_target_encoder(
    trial: TrialDir, config: TrialConfig, device: torch.device
) -> tuple[nn.Module, int]:
    """The target encoder of the newest checkpoint, and its step.

    Raises CheckpointError when there is none.
    """
    step, parts = trial_weights.read_trial(trial)
    with torch.device("meta"):
        target = IJepa(config.recipe).target
    target.load_state_dict(parts["target"], assign=True)
    return target.to(device).eval().requires_grad_(False), step


def encode_split(
    target: nn.Module,
    config: TrialConfig,
    split: str,
    limit: int | None,
) -> tuple[Tensor, Tensor]:
    """Output patches float16 [n, N, D] and classes [n] of a split."""
    device = next(target.parameters()).device
    patches: list[Tensor] = []
    classes: list[Tensor] = []
    with torch.no_grad():
        for images, labels, _ in labelled(config, split, limit, 0, 1, BATCH):
            if "class" not in labels:
                what = "the probe wants classes, the shards have none"
                raise DataError(what, where=config.runtime.data_root)
            pixels = normalise(images.to(device), config.recipe.data)
            patches.append(target(pixels).half().cpu())
            classes.append(labels["class"].long())
    return torch.cat(patches), torch.cat(classes)


def logistic(
    x: Tensor,
    y: Tensor,
    decay: float,
    classes: int,
) -> nn.Linear:
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
        generator = torch.Generator().manual_seed(0)
        self.query = nn.Parameter(torch.randn(1, 1, width, generator=generator) * 0.02)
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Patches [b, N, D] -> logits [b, classes]."""
        x = self.norm(x)
        query = self.query.expand(len(x), -1, -1)
        pooled, _ = self.attend(query, x, x, need_weights=False)
        return self.head(pooled[:, 0])


def attentive_top1(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    heads: int,
    classes: int,
) -> float:
    """Fit the attentive probe on all labels; return its accuracy."""
    (x, y), (test_x, test_y) = train, test
    torch.manual_seed(0)
    probe = AttentiveProbe(x.shape[2], heads, classes)
    solver = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(solver, LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = F.cross_entropy(probe(x[chosen].float()), y[chosen])
            solver.zero_grad()
            loss.backward()
            solver.step()
            schedule.step()
    probe.eval()
    with torch.no_grad():
        logits = torch.cat([probe(part.float()) for part in test_x.split(BATCH)])
    return accuracy(logits, test_y)


def evaluate(trial: TrialDir, limit: int | None) -> dict[str, float]:
    """Return step, logistic_1pct_top1 and attentive_top1 on the validation split.

    limit: number of training images to use.
    """
    config = trial.read_config()
    device = torch.device("cpu")
    if torch.cuda.is_available() and config.runtime.device != "cpu":
        device = torch.device("cuda")
    else:
        config = replace(config, runtime=replace(config.runtime, workers=0))
    target, step = load_target_encoder(trial, config, device)
    train = encode_split(target, config, "train", limit)
    test = encode_split(target, config, "val", limit)
    classes = int(max(train[1].max(), test[1].max())) + 1
    return {
        "step": step,
        "logistic_1pct_top1": logistic_top1(train, test, classes),
        "attentive_top1": attentive_top1(train, test, config.recipe.model.heads, classes),
    }


def logistic_top1(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
) -> float:
    """Fit the logistic probe on LABEL_FRACTION of the labels; return its accuracy."""
    (x, y), (test_x, test_y) = train, test
    pooled = x.float().mean(1)
    test_pooled = test_x.float().mean(1)
    chosen = stratified_subset(y, LABEL_FRACTION)
    mean = pooled.mean(0)
    deviation = pooled.std(0) + 1e-6
    inputs = (pooled[chosen] - mean) / deviation
    labels = y[chosen]
    # Every second image: of each class, since `stratified_subset` lists them class by class.
    half = slice(0, None, 2)
    other = slice(1, None, 2)
    scores: list[float] = []
    for decay in WEIGHT_DECAYS:
        probe = logistic(inputs[half], labels[half], decay, classes)
        scores.append(accuracy(probe(inputs[other]), labels[other]))
    best = WEIGHT_DECAYS[scores.index(max(scores))]
    probe = logistic(inputs, labels, best, classes)
    return accuracy(probe((test_pooled - mean) / deviation), test_y)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())
