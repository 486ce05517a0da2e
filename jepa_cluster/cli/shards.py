from __future__ import annotations

from jepa_cluster.cli import Verbs


def add(verbs: Verbs) -> None: ...
