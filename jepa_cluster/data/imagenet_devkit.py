"""The classes of ImageNet's validation images, from the development kit as it is downloaded.

    ILSVRC2012_devkit_t12.tar.gz
      .../data/ILSVRC2012_validation_ground_truth.txt   line n: class of ILSVRC2012_val_<n>.JPEG
      .../data/meta.mat                                 which WordNet id has that number

In: the archive. Out: file name -> (WordNet id, no further labels), as a labels file would give it.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

from jepa_cluster.errors import DataError

Label = str | int | None  # the name or number of a class
Labels = dict[str, tuple[Label, dict[str, Any]]]  # file -> class, further labels

KIT = "devkit_t12.tar.gz"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def validation_labels(archive: Path) -> Labels:
    """Read the class of each validation image.

    Raises DataError when the archive is not the kit, or scipy, which reads MATLAB's files, is
    missing.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        what = "reading the development kit needs scipy"
        raise DataError(what, hint="pip install scipy") from error
    try:
        files = _read_files(archive)
        synsets = loadmat(io.BytesIO(files[META]), squeeze_me=True)["synsets"]
        wordnet_ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        labels: Labels = {}
        for line, number in enumerate(files[TRUTH].split(), 1):
            labels[f"ILSVRC2012_val_{line:08d}.JPEG"] = (wordnet_ids[int(number)], {})
        return labels
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError, TypeError) as error:
        what = f"not the development kit: {type(error).__name__}: {error}"
        raise DataError(what, where=str(archive), hint="download it again") from error


def _read_files(archive: Path) -> dict[str, bytes]:
    """Read the two files of the kit that are needed, by their base names."""
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as kit:
        for member in kit:
            name = Path(member.name).name
            file = kit.extractfile(member)  # None for a folder
            if file is not None and name in (TRUTH, META):
                found[name] = file.read()
    return found
