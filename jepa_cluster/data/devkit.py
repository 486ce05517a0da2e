"""The classes of ImageNet's validation images, from the development kit as it is downloaded.

    ILSVRC2012_devkit_t12.tar.gz
      .../data/ILSVRC2012_validation_ground_truth.txt   line n: the number of ILSVRC2012_val_0000000n.JPEG's class
      .../data/meta.mat                                 which WordNet id has that number

In: the archive. Out: file name -> (WordNet id, nothing else), as a labels file would give it.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

from jepa_cluster.errors import DataError

KIT = "devkit_t12.tar.gz"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def validation_labels(archive: Path) -> dict[str, tuple[str | int | None, dict[str, Any]]]:
    """Raises DataError when the archive is not the kit, or scipy, which reads MATLAB's files, is missing."""
    try:
        from scipy.io import loadmat
    except ImportError as e:
        raise DataError("reading the development kit needs scipy", now="pip install scipy") from e
    try:
        with tarfile.open(archive) as kit:
            held = {Path(m.name).name: m for m in kit.getmembers() if m.isfile()}
            truth, meta = (kit.extractfile(held[name]).read() for name in (TRUTH, META))
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets}
        return {f"ILSVRC2012_val_{n:08d}.JPEG": (wnid[int(number)], {}) for n, number in enumerate(truth.split(), 1)}
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError, TypeError) as e:
        raise DataError(
            f"not the development kit: {type(e).__name__}: {e}", where=str(archive), now="download it again"
        ) from e
