"""Qwen3, dense (Yang et al. 2025), text alone: head norms on q and k, no projection biases, a head dim of its own."""

from dataclasses import replace

from transformers import Qwen3Config, Qwen3ForCausalLM

from mmpeft_fast.models.llama import real_text, tiny_text
from mmpeft_fast.models.qwen2 import QWEN2, ROPE


def _config(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, *, tied: bool) -> Qwen3Config:
    extra = {"head_dim": 128, "max_position_embeddings": 40960, "rope_parameters": dict(ROPE)}
    return Qwen3Config(**real_text(hidden, inner, layers, heads, kv_heads, 151936, tie_word_embeddings=tied, **extra))


def _tiny_config(vocab_size: int, token_id) -> Qwen3Config:
    # 4 heads of 32 on 256 features: q and o are not square, as in the smallest published sizes.
    return Qwen3Config(**tiny_text(vocab_size, token_id, eos_token="<|im_end|>", head_dim=32))


QWEN3 = replace(
    QWEN2,
    name="qwen3",
    model_class=Qwen3ForCausalLM,
    model_types=("qwen3",),
    sizes={
        "qwen3-0.6b": lambda: _config(1024, 3072, 28, 16, 8, tied=True),
        "qwen3-8b": lambda: _config(4096, 12288, 36, 32, 8, tied=False),
    },
    tiny_config=_tiny_config,
)
