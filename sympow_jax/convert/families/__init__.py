"""The families that are understood, the first that fits being the one that a model is written as."""

from sympow_jax.convert.families import gemma, gpt, llama
from sympow_jax.convert.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (*llama.FAMILIES, *gemma.FAMILIES, *gpt.FAMILIES)
}
