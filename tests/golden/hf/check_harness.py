"""The answers of lm-eval's own Hugging Face model and of ours to the same requests about the same random Llama.

    /tmp/oracle/bin/pip install -r requirements-oracle.txt 'lm-eval[hf]==0.4.13'
    /tmp/oracle/bin/python tests/golden/hf/check_harness.py make FOLDER     # FOLDER/model and FOLDER/theirs.json
    python -m sympow_jax.convert import FOLDER/model --workdir=FOLDER/run   # with the extras hf and lm-eval
    python tests/golden/hf/check_harness.py compare FOLDER

Requests: 24 contexts of 20 to 1,400 characters of the standard library, each with its own continuation, and an empty
context; 6 whole texts; 20 greedy continuations of 24 tokens.
"""
# pyright: reportMissingImports=false, reportArgumentType=false

import email
import json
import pathlib
import random
import sys

GENERATION = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}


def texts() -> list[str]:
    """Sources that every Python has."""
    return [path.read_text() for path in sorted(pathlib.Path(email.__file__).parent.glob("*.py"))]


def answers(lm: object) -> dict[str, list]:
    """What the model says to each request."""
    from lm_eval.api.instance import Instance

    draw, sources, pairs = random.Random(1), texts(), [("", "import os")]
    for n in range(24):
        text, start, length = sources[n % len(sources)], draw.randint(0, 500), 20 + 60 * n
        end = start + length
        pairs.append((text[start:end], text[end : end + draw.randint(5, 40)]))
    asked = {
        "loglikelihood": pairs,
        "loglikelihood_rolling": [(text[: 1500 + 300 * n],) for n, text in enumerate(sources[:6])],
        "generate_until": [(text[: 30 + 37 * n], GENERATION) for n, text in enumerate(sources[:20])],
    }
    return {
        kind: getattr(lm, kind)([Instance(kind, {}, arguments, n) for n, arguments in enumerate(requests)])
        for kind, requests in asked.items()
    }


def make(folder: pathlib.Path) -> None:
    """Writes a random Llama with a byte-level tokenizer, and what lm-eval's own model answers."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts(), trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "model")
    config = transformers.LlamaConfig(
        vocab_size=800, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, initializer_range=0.08,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    lm = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=4, max_length=4096)
    (folder / "theirs.json").write_text(json.dumps(answers(lm)))


def compare(folder: pathlib.Path) -> None:
    """Prints how far our answers are from theirs."""
    import sympow_jax
    from sympow_jax.generation.text_model import TextModel
    from sympow_jax.lm_eval import language_model

    theirs = json.loads((folder / "theirs.json").read_text())
    model = TextModel(*sympow_jax.load(str(folder / "run")), batch_size=4, bos=False)
    ours = answers(language_model(model))
    pairs = list(zip(ours["loglikelihood"], theirs["loglikelihood"], strict=True))
    print(f"log-likelihoods: {max(abs(a[0] - b[0]) for a, b in pairs):.1e} nats apart at most,", end=" ")
    print(f"greedy flags equal: {all(a[1] == b[1] for a, b in pairs)}, {model.scorer.num_programs} programs")
    rolling = zip(ours["loglikelihood_rolling"], theirs["loglikelihood_rolling"], strict=True)
    print(f"whole texts: {max(abs(a / b - 1) for a, b in rolling):.1e} relative")
    same = [a == b for a, b in zip(ours["generate_until"], theirs["generate_until"], strict=True)]
    print(f"continuations: {sum(same)} of {len(same)} equal, {model.num_programs} programs in all")


if __name__ == "__main__":
    {"make": make, "compare": compare}[sys.argv[1]](pathlib.Path(sys.argv[2]))
