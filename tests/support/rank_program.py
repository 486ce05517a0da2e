"""The program of each rank: a call that sharded.py has pickled, or an attempt at a trial."""

import sys
from pathlib import Path

if __name__ == "__main__":
    path = Path(sys.argv[1])
    if path.suffix == ".call":
        from support import sharded

        sharded.answer(path)
    else:
        from support import faulty_rank

        faulty_rank.main()
