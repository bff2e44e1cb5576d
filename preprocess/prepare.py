"""Makes training slices and test volumes: `python preprocess/prepare.py SRC -o DST --dataset NAME|FILE.yaml`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a source tree needs no installation

from samlora.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
