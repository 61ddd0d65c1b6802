"""Tokens a second of scoring and continuing texts as lm-eval asks for it, by the quickstart's model, random weights.

    python benchmarks/harness.py [--variant=conformal_sympow] [--repeats=3]

48 pairs of context and continuation with 24 different lengths of 60 to 1,440 bytes, once to compile and then warm; 24
greedy continuations of 32 bytes after prompts of the same lengths. CPU seconds are of all threads of the process.
There is a device a core, as in `sympow_jax.lm_eval` for a run of the quickstart.
"""

import argparse
import os
import pathlib
import platform
import statistics
import time

import jax
import numpy as np

from sympow_jax.config import parse_flags
from sympow_jax.generation.text_model import TextModel
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.cpu_devices import use_cpu_devices
from sympow_jax.training.evaluation_mesh import evaluation_mesh

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="conformal_sympow")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    tokenizer = ByteTokenizer()
    config = resolve_implementation(parse_flags([f"--config={ROOT}/configs/quickstart.py:{flags.variant}"]))
    use_cpu_devices(config)
    model = Model(config, tokenizer.vocab_size, evaluation_mesh(config, {}, rows=16))
    texts = TextModel(model, model.init(jax.random.key(0)), tokenizer)
    draw = np.random.default_rng(0)
    rows = [draw.integers(97, 123, 60 * (n % 24 + 1)).tolist() for n in range(48)]
    pairs, count = [(row[:-20], row[-20:]) for row in rows], sum(map(len, rows))
    prompts = [("".join(map(chr, row)), {"max_gen_toks": 32}) for row in rows[:24]]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {jax.device_count()} devices, {flags.variant}")
    print(f"{count:,} tokens of {len(rows)} texts")
    for name, ask, number in (
        ("scored", lambda: texts.log_likelihoods(pairs), count),
        ("continued", lambda: texts.continuations(prompts), 24 * 32),
    ):
        before = texts.num_programs
        ask()
        wall, cpu = [], []
        for _ in range(flags.repeats):
            began, used = time.perf_counter(), time.process_time()
            ask()
            wall.append(number / (time.perf_counter() - began))
            cpu.append(number / (time.process_time() - used))
        print(
            f"{name}: {texts.num_programs - before} programs; {statistics.median(wall):,.0f} tokens/s (best "
            f"{max(wall):,.0f}), {statistics.median(cpu):,.0f} tokens a second of CPU"
        )


if __name__ == "__main__":
    main()
