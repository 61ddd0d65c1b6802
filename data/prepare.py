#!/usr/bin/env python3
"""Any text into a store to train on, and a check of one: `python data/prepare.py --help`, data/README.md."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from sympow_jax.prepare import main

if __name__ == "__main__":
    main()
