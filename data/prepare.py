#!/usr/bin/env python3
"""Any text into a store to train on, and a check of one.

    python data/prepare.py python-stdlib --output=DIR
    python data/prepare.py text FILE FOLDER 'GLOB/*.jsonl.gz' --output=DIR --tokenizer=gpt2:VOCABULARY_FOLDER
    python data/prepare.py nanogpt train.bin --output=DIR --tokenizer=gpt2:VOCABULARY_FOLDER
    python data/prepare.py 'tfds:NAME?split=train&field=text' --output=DIR
    python data/prepare.py verify DIR_OR_STORE ...

DIR gets train.zarr and heldout.zarr. A killed run continues when the same command is given again.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from sympow_jax.prepare import main

if __name__ == "__main__":
    main()
