"""Measures an adapter on labelled volumes: the same as `samlora test`."""

import sys

from samlora.cli import main

if __name__ == "__main__":
    sys.exit(main(["test", *sys.argv[1:]]))
