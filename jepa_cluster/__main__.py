"""`python -m jepa_cluster` is `jepa`."""

from jepa_cluster.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
