"""`jepa masks` and `jepa weights`: see what a mask setting means; carry weights to and from other libraries."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.completers import attach, overrides
from jepa_cluster.cli.verb import ask_json, finish, print_json

SAMPLES = 4096  # masks behind a histogram


def add(verbs: Verbs) -> None:
    p = verbs.add_parser("masks", help="see what a mask setting means before paying for it")
    inner = p.add_subparsers(metavar="VERB", required=True)
    show = inner.add_parser("show", help="sampled masks and where patches fall, in the terminal and as a PNG")
    help_text = "settings in Hydra's grammar: mask=reference 'mask.target_scale=[.1,.2]'"
    attach(show.add_argument("override", nargs="*", default=[], help=help_text), overrides)
    show.add_argument("--png", type=Path, help="also draw a preview to this file")
    show.add_argument("--seed", type=int, default=0, help="seed of the masks (default 0)")
    ask_json(show)
    show.set_defaults(run=masks_show)

    p = verbs.add_parser("weights", help="weights from and for other libraries")
    inner = p.add_subparsers(metavar="VERB", required=True)
    export = inner.add_parser("export", help="weights -> timm, transformers or the format of the reference code")
    export.add_argument(
        "source", type=Path, help="weights file or folder, or a trial directory (its newest checkpoint)"
    )
    export.add_argument("out", type=Path, help="folder (timm, transformers) or file to write")
    export.add_argument("--to", choices=("timm", "transformers", "published"), required=True, help="format")
    export.add_argument(
        "--part", choices=("target", "encoder"), default="target", help="which encoder (default target)"
    )
    export.add_argument("--heads", type=int, help="attention heads, where the file does not say")
    ask_json(export)
    export.set_defaults(run=weights_export)
    inspect = inner.add_parser("inspect", help="format, parts and sizes of a weights file")
    inspect.add_argument("source", type=Path, help="weights file or folder, or a trial directory")
    ask_json(inspect)
    inspect.set_defaults(run=weights_inspect)


def masks_show(arguments: argparse.Namespace) -> int:
    from jepa_cluster.config import config_from_dict
    from jepa_cluster.ijepa import mask_preview
    from jepa_cluster.sweep.compose import Composer, conf_dir, parse_override

    composer = Composer(conf_dir(), {})
    plain = composer.compose([parse_override(text, "the command line") for text in arguments.override])
    recipe = config_from_dict(plain, "the command line").recipe
    shown = mask_preview.preview(recipe.mask, recipe.model.grid, arguments.seed, SAMPLES)
    png = mask_preview.save_png(shown, arguments.png) if arguments.png else None
    if arguments.json:
        print_json(arguments, {**mask_preview.document(shown), "png": png and str(png)})
        return 0
    print(mask_preview.text(shown))
    if png:
        print(f"wrote {png}")
    return 0


def weights_of(path: Path) -> Any:
    """Weights of a file or folder, or of the newest checkpoint of a trial directory; every byte of it is checked."""
    from jepa_cluster.ijepa import weights
    from jepa_cluster.trial.directory import TrialDir

    trial = TrialDir(path)
    if not trial.checkpoints.is_dir():
        return weights.read(path)
    import torch

    from jepa_cluster.ijepa.objective import IJepa
    from jepa_cluster.training import checkpoint

    config = trial.read_config()
    step, tensors = checkpoint.load_latest(trial)
    model = IJepa(config.recipe)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensors[f"model.{name}"])
    found = weights.from_model(model, config.recipe.model.heads)
    return dataclasses.replace(found, notes={"step": step})


def weights_export(arguments: argparse.Namespace) -> int:
    from jepa_cluster.ijepa import weights

    found = weights_of(arguments.source)
    if arguments.heads:
        found = dataclasses.replace(found, sizes=dataclasses.replace(found.sizes, heads=arguments.heads))
    path = weights.write(found, arguments.to, arguments.out, arguments.part)
    document = {"written": str(path), "format": arguments.to, "part": arguments.part, "from": found.format}
    return finish(arguments, document, f"wrote {path}")


def weights_inspect(arguments: argparse.Namespace) -> int:
    found = weights_of(arguments.source)
    s = found.sizes
    lines = [
        f"format     {found.format}",
        f"encoder    width {s.width}, depth {s.depth}, heads {s.heads or 'unknown'}, MLP {s.hidden}, patch {s.patch}",
        f"image      {s.grid * s.patch} px, {s.grid}x{s.grid} patches",
    ]
    if s.predictor_width:
        lines.append(f"predictor  width {s.predictor_width}, depth {s.predictor_depth}")
    parts: dict[str, Any] = {}
    for name, part in found.parts.items():
        kinds = sorted({str(t.dtype).removeprefix("torch.") for t in part.values()})
        parts[name] = {"numbers": sum(t.numel() for t in part.values()), "tensors": len(part), "kinds": kinds}
        lines.append(f"part       {name}: {parts[name]['numbers']:,} numbers, {len(part)} tensors, {', '.join(kinds)}")
    notes = {k: found.notes[k] for k in ("epoch", "step", "model_type", "architecture") if k in found.notes}
    lines += [f"{key:10} {value}" for key, value in notes.items()]
    document = {"format": found.format, "sizes": dataclasses.asdict(s), "parts": parts, "notes": notes}
    return finish(arguments, document, "\n".join(lines))
