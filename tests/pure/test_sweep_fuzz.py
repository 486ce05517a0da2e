"""Mutated sweep files and overrides: each is accepted, or refused with one clear error. Never a traceback or a hang."""

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from jepa_cluster.errors import JepaError
from jepa_cluster.sweep import compose, resolve, sweep_file, yaml_source
from jepa_cluster.sweep.compose import Composer
from jepa_cluster.sweep.points import ResourceRequest
from jepa_cluster.trial.files import write_json

SEED = """question: Does it?
expect: It does.
base: [data=synthetic, optim.batch=32, optim.warmup_epochs=1, mask.targets=2]
grid:
  model: [vit_ti, vit_s]
  mask.target_scale: [[0.1, 0.15], [0.15, 0.2]]
zip:
  optim.lr: [1e-3, 5e-4]
  optim.weight_decay: [0.04, 0.1]
seeds: [0, 1]
where: model != 'vit_s' or (seed == 0 and mask.target_scale[0] < 0.2)
resources:
  - {when: "model == 'vit_s'", nodes: 2, procs_per_node: 4, time: 1d12h}
  - {time: 8h}
limits: {gpu_hours: 900, gpus_in_flight: 96}
retries: {node: 2, hang: 0}
"""
WORDS = """
model mask optim seed runtime.nodes data.digest vit_xl null ~ true -1 0 1e999 .nan .inf 3.5 '' [] {} [[]] - : ? ! & * %
@ $ ${seed} ${oc.env:HOME} {{x}} !!python/object:os.system &a *a <<: | > # lambda x= y=, __import__('os') 9**9**9
model.width==3 'x'*9 a.b.c [0,1] [0.1,0.2,0.3] 1,2,3 choice(1,2) +x=1 ~model model@x=y 8h 0h 99999999999d é ☃ \x00
2026-11-24 0x10 1_000 yes no {a:b} &x[*x]
"""
OVERRIDES = """
data=synthetic model=vit_s mask=reference optim.batch=32 optim.lr=1e-3 optim.epochs=2 optim.steps=50
optim.warmup_epochs=1 mask.targets=2 mask.target_scale=[0.1,0.15] mask.mode=multiblock model.image=96
model.depth=3 predictor.depth=2 probe.images=100 +model.timm.qk_norm=true runtime.workers=2 optim.precision=fp32
"""
NUMBERS = "0 1 -1 2 3 4 8 0.1 0.15 1.5 1e-3 1e9 64 96 224 1000 [0.1,0.2] [0.2,0.1] [1,2,3] null true"
COUNT = 1200  # of files, and of sets of overrides
LARGEST = 64  # trials of a sweep that is resolved here


@pytest.fixture
def composer(tmp_path: Path) -> Composer:
    (tmp_path / "train").mkdir()
    facts = {"version": 1, "digest": "0" * 16, "images": 640, "shards": [], "labels": ["class"], "classes": []}
    write_json(tmp_path / "train" / "manifest.json", {**facts, "report": {}})
    return Composer(compose.conf_dir(), {"data_root": str(tmp_path)})


def mutate(text: str, source: random.Random) -> str:
    """One to three small damages: a line gone, doubled, moved or indented; a token replaced; a character flipped."""
    for _ in range(source.randint(1, 3)):
        lines = text.split("\n")
        i = source.randrange(len(lines))
        match source.randrange(7):
            case 0:
                del lines[i]
            case 1:
                lines.insert(source.randrange(len(lines)), lines[i])
            case 2:
                lines[i] = " " * source.randint(0, 4) + lines[i].strip()
            case 3 | 4:
                tokens = list(re.finditer(r"[\w.']+", lines[i])) or [re.match("", lines[i])]
                token = source.choice(tokens)
                assert token
                lines[i] = lines[i][: token.start()] + source.choice(WORDS.split()) + lines[i][token.end() :]
            case 5:
                at = source.randrange(len(lines[i]) + 1)
                lines[i] = lines[i][:at] + source.choice("[]{}:,-'\"#&*!|>%@`\\\t =.0a") + lines[i][at + 1 :]
            case _:
                lines[i] += source.choice(WORDS.split())
        text = "\n".join(lines) or "?"
    return text


def garble(override: str, source: random.Random) -> str:
    """One damage to key=value: another's value, another number, a slip of the pen, a word, a character."""
    key, _, value = override.partition("=")
    at = source.randrange(len(override))
    match source.randrange(6):
        case 0:
            return f"{key}={source.choice(OVERRIDES.split()).partition('=')[2]}"
        case 1 | 2:
            return f"{key}={source.choice(NUMBERS.split())}"
        case 3:
            return override[:at] + override[at + 1 :]
        case 4:
            return source.choice([f"{source.choice(WORDS.split())}={value}", f"{key}={source.choice(WORDS.split())}"])
        case _:
            return override[:at] + source.choice("[]{}:,-'\"#&*!|>%@`\\\t =.0a+~$()") + override[at:]


def judge(texts: Iterable[str], composer: Composer) -> tuple[int, int, set[str]]:
    """Each file through the same path as `jepa plan` -> how many were judged, accepted, and kinds of error met."""
    judged, accepted, errors = 0, 0, set[str]()
    for text in texts:
        try:
            sweep = sweep_file.from_source(yaml_source.parse(text, "x.yaml"), "x")
            if len(sweep.seeds) * sum(1 for _ in sweep.points()) > LARGEST:
                continue
            accepted += bool(resolve.resolve(sweep, ResourceRequest("", 1, 2, 60), {}, composer))
            judged += 1
        except JepaError as e:
            judged += 1
            assert e.what and "\n" not in e.what.strip(), (text, e.what)
            assert e.where, (text, e.what)
            errors.add(e.what.split("'")[0][:24])
        except Exception as e:
            pytest.fail(f"{type(e).__name__}: {e}\nfor:\n{text}")
    return judged, accepted, errors


def test_every_mutated_sweep_file_is_accepted_or_refused_with_one_clear_error(composer: Composer):
    """1 200 files from a fixed seed, axes and rules and overrides alike damaged."""
    judged, accepted, errors = judge((mutate(SEED, random.Random(i)) for i in range(COUNT)), composer)
    assert judged >= 1000, "too many mutations made a sweep too large to resolve here"
    assert accepted > COUNT / 15, "the mutations are too rough to test anything but YAML"
    assert len(errors) > 25, "the mutations do not reach the checks"


def test_every_mutated_override_is_accepted_or_refused_with_one_clear_error(composer: Composer):
    """1 200 sets of four or five overrides, one of them damaged, as the base of a sweep that is otherwise sound."""
    sets: list[list[str]] = []
    for i in range(COUNT):
        source = random.Random(i)
        chosen = [
            "data=synthetic",
            "optim.batch=32",
            "optim.warmup_epochs=1",
            *source.sample(OVERRIDES.split(), source.randint(1, 2)),
        ]
        chosen[-1] = garble(chosen[-1], source)
        sets.append(chosen)
    judged, accepted, errors = judge((json.dumps({"question": "Does it?", "base": s}) for s in sets), composer)
    assert judged == COUNT
    assert COUNT / 15 < accepted < COUNT / 2, "the damage is too rough, or none"
    assert len(errors) > 15, "the mutations do not reach the checks"
