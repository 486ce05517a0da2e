"""Mutated sweep files: each is accepted, or refused with one clear error. Never a traceback, never a hang."""

import random
import re
from pathlib import Path

import pytest

from jepa_cluster.errors import JepaError
from jepa_cluster.sweep import definition, located, resolve
from jepa_cluster.sweep.definition import Need
from jepa_cluster.sweep.resolve import Composer
from jepa_cluster.trial.layout import write_json

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
FILES = 1200


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


def test_every_mutated_sweep_file_is_accepted_or_refused_with_one_clear_error(tmp_path: Path):
    """1 200 files from a fixed seed, through the same path as `jepa plan`."""
    (tmp_path / "train").mkdir()
    facts = {"version": 1, "digest": "0" * 16, "images": 640, "shards": [], "labels": ["class"], "classes": []}
    write_json(tmp_path / "train" / "manifest.json", {**facts, "report": {}})
    composer = Composer(resolve.conf_dir(), {"data_root": str(tmp_path)})
    accepted, errors = 0, dict[str, int]()
    for i in range(FILES):
        text = mutate(SEED, random.Random(i))
        try:
            sweep = definition.from_located(located.parse(text, "x.yaml"), "x")
            if len(sweep.seeds) * sum(1 for _ in sweep.points()) > 64:
                continue
            accepted += bool(resolve.resolve(sweep, Need("", 1, 2, 60), {}, composer))
        except JepaError as e:
            assert e.what and "\n" not in e.what.strip(), (text, e.what)
            assert e.where, (text, e.what)
            errors[e.what.split("'")[0][:24]] = 1
        except Exception as e:
            pytest.fail(f"{type(e).__name__}: {e}\nfor file {i}:\n{text}")
    assert accepted > FILES / 15, "the mutations are too rough to test anything but YAML"
    assert len(errors) > 25, "the mutations do not reach the checks"
