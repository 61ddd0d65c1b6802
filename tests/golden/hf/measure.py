"""What transformers makes of the cases beside their logits: losses, greedy tokens, and what bfloat16 costs it.

    /tmp/oracle/bin/python tests/golden/hf/measure.py        # writes figures.json beside this file

`nll`: of scaled Llamas, the mean loss of the first T tokens of each of `documents`, in nats, by a float32 pass over BOS
and T - 1 of them. `greedy`: the most likely NEW tokens after PROMPT of the first document, each by a pass over a row
padded to its final length, which is what dynamic scaling scales to. `bfloat16`: of every case, the root mean square of
what bfloat16 changes in logits of `sequences`, parameters in bfloat16 and attention by PyTorch's kernel.
"""
# pyright: reportMissingImports=false, reportArgumentType=false

import json
import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SCALED = ("llama", "llama_linear", "llama_yarn", "llama_llama3", "llama_dynamic")
V, FIRST = 96, 3  # ids 0 to 2 are special
LENGTHS = (64, 128, 256)
PROMPT, NEW = 40, 60


def documents() -> np.ndarray:
    """[8, 256] tokens."""
    return np.random.default_rng(19).integers(FIRST, V, (8, max(LENGTHS)))


def sequences() -> np.ndarray:
    """[32, 128] tokens."""
    return np.random.default_rng(20).integers(0, V, (32, 128))


def _load(case: str, dtype: torch.dtype) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(HERE / case, dtype=dtype).eval()


def _losses(model: torch.nn.Module) -> list[list[float]]:
    """[document][length]."""
    found = []
    for row in torch.tensor(documents()):
        inputs = torch.cat([torch.tensor([0]), row[:-1]])
        each = []
        for length in LENGTHS:
            logits = model(inputs[None, :length]).logits[0].double()
            each.append(float(torch.nn.functional.cross_entropy(logits, row[:length])))
        found.append(each)
    return found


def _greedy(model: torch.nn.Module) -> list[int]:
    row = torch.zeros(1, PROMPT + NEW, dtype=torch.long)
    row[0, :PROMPT] = torch.tensor(documents()[0, :PROMPT])
    for at in range(PROMPT, PROMPT + NEW):
        row[0, at] = model(row).logits[0, at - 1].argmax()
    if model.config.rope_parameters["rope_type"] != "dynamic":
        own = model.generate(row[:, :PROMPT], max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(own, row)
    return row[0, PROMPT:].tolist()


def _bfloat16_error(case: str) -> float:
    tokens = torch.tensor(sequences())
    exact, rounded = (_load(case, dtype)(tokens).logits.double() for dtype in (torch.float32, torch.bfloat16))
    return float((exact - rounded).square().mean().sqrt())


def main() -> None:
    """Writes the figures."""
    with torch.no_grad():
        figures = {  # a model of dynamic scaling remembers the longest text that it saw: each gets its own
            "nll": {case: _losses(_load(case, torch.float32)) for case in SCALED},
            "greedy": {case: _greedy(_load(case, torch.float32)) for case in SCALED},
        }
        cases = sorted(path.parent.name for path in HERE.glob("*/config.json"))
        figures["bfloat16"] = {case: _bfloat16_error(case) for case in cases if case != "brumby"}
    (HERE / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
