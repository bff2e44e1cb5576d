"""Trains an adapter: the same as `samlora train`."""

import sys

from samlora.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
