"""Mutated sweep files and overrides: each is accepted, or refused with one clear error."""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
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
TEXTS = {
    "words": """
        model mask optim seed runtime.nodes data.digest vit_xl null ~ true -1 0 1e999 .nan .inf 3.5
        '' [] {} [[]] - : ? ! & * % @ $ ${seed} ${oc.env:HOME} {{x}} !!python/object:os.system &a *a
        <<: | > # lambda x= y=, __import__('os') 9**9**9 model.width==3 'x'*9 a.b.c [0,1]
        [0.1,0.2,0.3] 1,2,3 choice(1,2) +x=1 ~model model@x=y 8h 0h 99999999999d é ☃ \x00
        2026-11-24 0x10 1_000 yes no {a:b} &x[*x]
        """,
    "overrides": """
        data=synthetic model=vit_s mask=reference optim.batch=32 optim.lr=1e-3 optim.epochs=2
        optim.steps=50 optim.warmup_epochs=1 mask.targets=2 mask.target_scale=[0.1,0.15]
        mask.mode=multiblock model.image=96 model.depth=3 predictor.depth=2 probe.images=100
        +model.timm.qk_norm=true runtime.workers=2 optim.precision=fp32
        """,
    "numbers": """
        0 1 -1 2 3 4 8 0.1 0.15 1.5 1e-3 1e9 64 96 224 1000 [0.1,0.2] [0.2,0.1] [1,2,3] null true
        """,
}
WORDS = TEXTS["words"].split()
OVERRIDES = TEXTS["overrides"].split()
NUMBERS = TEXTS["numbers"].split()
CHARACTERS = "[]{}:,-'\"#&*!|>%@`\\\t =.0a"
COUNT = 1200  # of files, and of sets of overrides
LARGEST = 64  # trials of a sweep that is resolved here


@pytest.fixture
def composer(tmp_path: Path) -> Composer:
    facts = {
        "version": 1,
        "digest": "0" * 16,
        "images": 640,
        "shards": [],
        "labels": ["class"],
        "classes": [],
        "report": {},
    }
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        write_json(tmp_path / split / "manifest.json", facts)
    return Composer(compose.conf_dir(), {"data_root": str(tmp_path)})


def mutate(text: str, source: random.Random) -> str:
    """Damage a sweep file at one to three places.

    A line is removed, doubled, moved or indented, a token is replaced, a character is inserted.
    """
    for _ in range(source.randint(1, 3)):
        lines = text.split("\n")
        i = source.randrange(len(lines))
        line = lines[i]
        match source.randrange(7):
            case 0:
                del lines[i]
            case 1:
                lines.insert(source.randrange(len(lines)), line)
            case 2:
                lines[i] = " " * source.randint(0, 4) + line.strip()
            case 3 | 4:
                tokens = list(re.finditer(r"[\w.']+", line)) or [re.match("", line)]
                token = source.choice(tokens)
                assert token
                lines[i] = line[: token.start()] + source.choice(WORDS) + line[token.end() :]
            case 5:
                at = source.randrange(len(line) + 1)
                lines[i] = line[:at] + source.choice(CHARACTERS) + line[at + 1 :]
            case _:
                lines[i] = line + source.choice(WORDS)
        text = "\n".join(lines) or "?"
    return text


def garble(override: str, source: random.Random) -> str:
    """Damage key=value: another value, another key, or one character more or less."""
    key, _, value = override.partition("=")
    at = source.randrange(len(override))
    before = override[:at]
    match source.randrange(6):
        case 0:
            _, _, other = source.choice(OVERRIDES).partition("=")
            return f"{key}={other}"
        case 1 | 2:
            return f"{key}={source.choice(NUMBERS)}"
        case 3:
            return before + override[at + 1 :]
        case 4:
            other_key = f"{source.choice(WORDS)}={value}"
            other_value = f"{key}={source.choice(WORDS)}"
            return source.choice([other_key, other_value])
        case _:
            return before + source.choice(CHARACTERS + "+~$()") + override[at:]


@dataclass
class Outcome:
    """How many sweep files were read, how many were accepted, and the kinds of error."""

    read: int = 0
    accepted: int = 0
    errors: set[str] = field(default_factory=set[str])


def plan_all(texts: Iterable[str], composer: Composer) -> Outcome:
    """Resolve each sweep file as `jepa plan` does. Sweeps that are too large are skipped."""
    request = ResourceRequest("", 1, 2, 60)
    outcome = Outcome()
    for text in texts:
        try:
            sweep = sweep_file.from_source(yaml_source.parse(text, "x.yaml"), "x")
            points = list(sweep.points())
            if len(sweep.seeds) * len(points) > LARGEST:
                continue
            outcome.accepted += bool(resolve.resolve(sweep, request, {}, composer))
        except JepaError as e:
            assert e.what, text
            assert "\n" not in e.what.strip(), (text, e.what)
            assert e.where, (text, e.what)
            kind, _, _ = e.what.partition("'")
            outcome.errors.add(kind[:24])
        except Exception as e:
            pytest.fail(f"{type(e).__name__}: {e}\nfor:\n{text}")
        outcome.read += 1
    return outcome


def test_a_mutated_sweep_file_is_accepted_or_refused_with_one_error(composer: Composer):
    """1 200 files from fixed seeds, with damaged axes, rules and overrides."""
    texts = [mutate(SEED, random.Random(i)) for i in range(COUNT)]
    outcome = plan_all(texts, composer)
    assert outcome.read >= 1000, "too many mutations made a sweep too large to resolve here"
    assert outcome.accepted > COUNT / 15, "the mutations are too rough to test anything but YAML"
    assert len(outcome.errors) > 25, "the mutations do not reach the checks"


def test_a_mutated_override_is_accepted_or_refused_with_one_error(composer: Composer):
    """1 200 sets of four or five overrides, one of them damaged, as the base of a valid sweep."""
    texts: list[str] = []
    for i in range(COUNT):
        source = random.Random(i)
        overrides = ["data=synthetic", "optim.batch=32", "optim.warmup_epochs=1"]
        overrides += source.sample(OVERRIDES, source.randint(1, 2))
        overrides[-1] = garble(overrides[-1], source)
        texts.append(json.dumps({"question": "Does it?", "base": overrides}))
    outcome = plan_all(texts, composer)
    assert outcome.read == COUNT
    assert COUNT / 15 < outcome.accepted < COUNT / 2, "the damage is too rough, or none"
    assert len(outcome.errors) > 15, "the mutations do not reach the checks"
