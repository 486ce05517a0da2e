"""The manifest of a checkpoint, and the rows of a tensor that a shard holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jepa_cluster.training.checkpoint_files import Manifest, parse_manifest, row_range

MANIFEST = Manifest(
    step=1,
    recipe="recipe",
    world=2,
    attempt=1,
    counters={"images": 0.1},
    row={"loss": 0.5},
    files={"a": [3, 4]},
    versions={},
    t=0,
)


def test_a_manifest_survives_writing_and_parsing(tmp_path: Path) -> None:
    parsed = parse_manifest(MANIFEST.to_bytes(), tmp_path)
    assert replace(parsed, files=dict(parsed.files)) == MANIFEST
    assert parsed.settled_through == 0


def test_a_changed_or_torn_manifest_fails_its_checksum(tmp_path: Path) -> None:
    data = MANIFEST.to_bytes()
    changed = [
        data.replace(b"0.5", b"0.4"),
        data.replace(b'"attempt": 1', b'"attempt": 2'),
        data[:-5],
    ]
    for text in changed:
        assert text != data
        with pytest.raises(ValueError):
            parse_manifest(text, tmp_path)


def test_row_range_splits_rows_as_torch_chunk_does() -> None:
    import torch

    for rows in (*range(1, 40), 257, 1024):
        for parts in (1, 2, 3, 4, 7, 8, 16, 33):
            chunks = torch.arange(rows).chunk(parts)
            for part in range(parts):
                expected = chunks[part].tolist() if part < len(chunks) else []
                first, last = row_range(rows, part, parts)
                assert list(range(first, last)) == expected
