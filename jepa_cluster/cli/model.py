"""The verbs `jepa masks ...` and `jepa weights ...`: preview masks; convert weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.options import Args, command, finish
from jepa_cluster.errors import ConfigError

MASK_SAMPLES = 4096  # of the histograms
SOURCE_HELP = "weights file or folder, or a trial directory (its newest checkpoint)"


def add(verbs: Verbs) -> None:
    masks = verbs.add_parser("masks", help="preview a mask setting")
    _add_show(masks.add_subparsers(metavar="VERB", required=True))
    weights = verbs.add_parser("weights", help="show weights and convert them for other libraries")
    kinds = weights.add_subparsers(metavar="VERB", required=True)
    _add_export(kinds)
    parser = command(kinds, weights_inspect, "inspect", root=False)
    parser.add_argument("source", type=Path, help=SOURCE_HELP)


def _add_show(kinds: Verbs) -> None:
    parser = command(kinds, masks_show, "show", root=False)
    parser.add_argument(
        "override",
        nargs="*",
        default=[],
        help="settings in Hydra's grammar: mask=reference 'mask.target_scale=[.1,.2]'",
    )
    parser.add_argument("--png", type=Path, help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the masks (default: 0)")


def _add_export(kinds: Verbs) -> None:
    parser = command(kinds, weights_export, "export", root=False)
    parser.add_argument("source", type=Path, help=SOURCE_HELP)
    parser.add_argument("out", type=Path, help="folder (timm, transformers) or file to write")
    formats = ("timm", "transformers", "published")
    parser.add_argument("--to", choices=formats, required=True, help="format")
    parts = ("target", "encoder")
    text = "encoder to export (default: target)"
    parser.add_argument("--part", choices=parts, default="target", help=text)
    text = "number of attention heads, if the file does not contain it"
    parser.add_argument("--heads", type=int, help=text)


def masks_show(args: Args) -> int:
    """Show sampled masks and how often each patch is in them, as text and as a PNG."""
    from jepa_cluster.config import config_from_dict
    from jepa_cluster.ijepa import mask_preview
    from jepa_cluster.sweep.compose import Composer, conf_dir, parse_override

    where = "the command line"
    settings = [parse_override(text, where) for text in args.override]
    recipe = config_from_dict(Composer(conf_dir(), {}).compose(settings), where).recipe
    if recipe.objective.target == "views":
        raise ConfigError("objective.target=views has no masks", where=where)
    preview = mask_preview.preview(recipe.mask, recipe.model.grid, args.seed, MASK_SAMPLES)
    png = str(mask_preview.save_png(preview, args.png)) if args.png else None
    text = mask_preview.text(preview)
    if png:
        text += f"\nwrote {png}"
    return finish(args, {**mask_preview.document(preview), "png": png}, text)


def weights_export(args: Args) -> int:
    """Convert weights to the format of timm, transformers or the reference code."""
    from jepa_cluster.ijepa import weights
    from jepa_cluster.training import trial_weights

    for written in (args.out, args.out / "model.safetensors"):
        if written.exists() and written.samefile(args.source):
            what = f"{args.out} is what would be read: the export would overwrite it"
            raise ConfigError(what, where=str(args.source), hint="name another file or folder")
    found = trial_weights.read(args.source)
    if args.heads:
        sizes = dataclasses.replace(found.sizes, heads=args.heads)
        found = dataclasses.replace(found, sizes=sizes)
    path = weights.write(found, args.to, args.out, args.part)
    document = {"written": str(path), "format": args.to, "part": args.part, "from": found.format}
    return finish(args, document, f"wrote {path}")


def weights_inspect(args: Args) -> int:
    """Show the format, parts and sizes of weights."""
    from jepa_cluster.training import trial_weights

    found = trial_weights.describe(trial_weights.read(args.source))
    s = found["sizes"]
    encoder = f"width {s['width']}, depth {s['depth']}, heads {s['heads'] or 'unknown'}"
    pixels = s["grid"] * s["patch"]
    lines = [
        f"format     {found['format']}",
        f"encoder    {encoder}, MLP {s['hidden']}, patch {s['patch']}",
        f"image      {pixels} px, {s['grid']}x{s['grid']} patches",
    ]
    if s["outputs"]:
        lines.append(f"predictor  width {s['predictor_width']}, depth {s['predictor_depth']}")
    for name, part in found["parts"].items():
        count = f"{part['numbers']:,} numbers, {part['tensors']} tensors"
        lines.append(f"part       {name}: {count}, {', '.join(part['kinds'])}")
    for key, value in found["notes"].items():
        lines.append(f"{key:10} {value}")
    return finish(args, found, "\n".join(lines))
