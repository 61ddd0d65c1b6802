"""Seconds and memory of importing a folder of the shape of SmolLM-135M: 30 layers, 49,152 tokens, bfloat16, random.

    python benchmarks/import_model.py [--folder=DIR] [--repeats=3] [--devices=1] [--mesh.fsdp=N ...]

The import runs in a process of its own, from `python` to its end. "beyond idle" is its largest resident size less that
of a process that has only imported the package and asked JAX for its devices; the model in float32 stands beside it.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "hidden_act": "silu", "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CHILD = """
import json, resource, sys, time
from sympow_jax.command_line import run_program
from sympow_jax.convert.__main__ import run
def timed(argv):
    import jax
    jax.devices()
    code = run(argv) if argv else 0
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"peak": used.ru_maxrss * 1024, "cpu": used.ru_utime + used.ru_stime}))
    return code
run_program(timed)
"""


def make_folder(folder: pathlib.Path) -> None:
    """Writes config.json, model.safetensors and a tokenizer.json of 49,152 byte-level tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    E, F, D = SHAPE["hidden_size"], SHAPE["intermediate_size"], 64
    H, K = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (SHAPE["vocab_size"], E), "model.norm.weight": (E,)}
    for layer in range(SHAPE["num_hidden_layers"]):
        of_layer = {
            "self_attn.q_proj": (H * D, E), "self_attn.k_proj": (K * D, E), "self_attn.v_proj": (K * D, E),
            "self_attn.o_proj": (E, H * D), "mlp.gate_proj": (F, E), "mlp.up_proj": (F, E), "mlp.down_proj": (E, F),
            "input_layernorm": (E,), "post_attention_layernorm": (E,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    draw = np.random.default_rng(0)
    tensors = {
        name: (0.02 * draw.standard_normal(shape, np.float32) + (len(shape) == 1)).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)


def _write_tokenizer(folder: pathlib.Path) -> None:
    """A byte-level BPE whose merges are pairs of letters, then pairs of those."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces, merges, pairs = ["<|endoftext|>", *alphabet], [], [a + b for a in alphabet[:92] for b in alphabet[:92]]
    merges += [(pair[0], pair[1]) for pair in pairs]
    longer = [(a, b) for a in pairs for b in alphabet[:92]]
    merges += longer[: SHAPE["vocab_size"] - len(pieces) - len(pairs)]
    pieces += [a + b for a, b in merges]
    library = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    (folder / "tokenizer.json").write_text(library.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>"}))


def run(arguments: list[str], devices: int) -> dict[str, float]:
    """Seconds of wall clock and CPU, and the peak, of one process."""
    flags = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
    started = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"XLA_FLAGS": flags},
        text=True,
    ).stdout
    return json.loads(out.splitlines()[-1]) | {"wall": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1)
    flags, mesh = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(flags.folder or scratch) / "smollm"
        if not (folder / "tokenizer_config.json").exists():
            make_folder(folder)
        idle = run([], flags.devices)
        found = []
        for _ in range(flags.repeats):
            shutil.rmtree(pathlib.Path(scratch) / "w", ignore_errors=True)
            found.append(run(["import", str(folder), f"--workdir={scratch}/w", *mesh], flags.devices))
    numbers = 134_515_008
    print(f"{platform.machine()}, {os.cpu_count()} cores; the model in float32 is {4 * numbers / 1e6:.0f} MB")
    print(f"idle: {idle['wall']:.1f} s, {idle['cpu']:.1f} s of CPU, {idle['peak'] / 1e6:.0f} MB")
    for name, unit in (("wall", "s"), ("cpu", "s of CPU")):
        values = [each[name] for each in found]
        print(f"import: {statistics.median(values):.1f} {unit} ({', '.join(f'{value:.1f}' for value in values)})")
    beyond = max(each["peak"] for each in found) - idle["peak"]
    print(f"beyond idle: {beyond / 1e6:.0f} MB, {beyond / (4 * numbers):.2f} of the model in float32")


if __name__ == "__main__":
    main()
