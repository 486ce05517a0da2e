"""`python -m jepa_cluster` is `jepa`; with overrides in place of a verb it is a Hydra app."""

import sys

from jepa_cluster.cli import main

if __name__ == "__main__":
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first in ("-m", "--multirun", "--cfg", "-c", "--info", "-i") or "=" in first:
        from jepa_cluster.launch.ops import hydra_app

        raise SystemExit(hydra_app.main())
    raise SystemExit(main())
