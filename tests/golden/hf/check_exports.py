"""Exports as transformers loads them: no key missing or unexpected, and the logits of the imported checkpoint.

python -m sympow_jax.convert export --workdir=W --output=EXPORT        # of a case of make.py, imported
/tmp/oracle/bin/python tests/golden/hf/check_exports.py CASE=EXPORT [CASE=EXPORT ...]
"""
# pyright: reportMissingImports=false, reportArgumentType=false

import pathlib
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent


def check(case: str, folder: str) -> None:
    """Prints how far the logits of an export are from those of its case; AssertionError for keys that do not fit."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32)
    faults = {name: keys for name, keys in info.items() if keys}
    assert not faults, (case, faults)
    arrays = np.load(HERE / case / "logits.npz")
    with torch.no_grad():
        logits = model.eval()(torch.tensor(arrays["tokens_64"].astype(np.int64))[None]).logits[0].numpy()
    print(f"{case}: {type(model).__name__}, {np.abs(logits - arrays['logits_64']).max():.1e}")


def main() -> None:
    """Checks what the arguments name."""
    for argument in sys.argv[1:]:
        check(*argument.split("=", 1))


if __name__ == "__main__":
    main()
