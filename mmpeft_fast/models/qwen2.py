"""Qwen2 and Qwen2.5 (Yang et al. 2024), text alone: biases on q, k, v."""

from dataclasses import replace

from transformers import Qwen2Config, Qwen2ForCausalLM

from mmpeft_fast.models.llama import LLAMA, real_text, tiny_text, tokenizer_with
from mmpeft_fast.models.qwen2_vl import CHAT_TEMPLATE

ROPE = {"rope_type": "default", "rope_theta": 1e6}


def text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool) -> Qwen2Config:
    """Configuration of a published size."""
    extra = {"max_position_embeddings": 32768, "tie_word_embeddings": tied, "rope_parameters": dict(ROPE)}
    return Qwen2Config(**real_text(hidden, inner, layers, heads, kv_heads, vocab, **extra))


def _tiny_config(vocab_size: int, token_id) -> Qwen2Config:
    return Qwen2Config(**tiny_text(vocab_size, token_id, eos_token="<|im_end|>"))


QWEN2 = replace(
    LLAMA,
    name="qwen2",
    model_class=Qwen2ForCausalLM,
    model_types=("qwen2",),
    sizes={
        "qwen2-1.5b": lambda: text(1536, 8960, 28, 12, 2, 151936, tied=True),
        "qwen2-7b": lambda: text(3584, 18944, 28, 28, 4, 152064, tied=False),
    },
    tiny_config=_tiny_config,
    tiny_processor=tokenizer_with(CHAT_TEMPLATE),
    special_tokens=("<|im_start|>", "<|im_end|>"),
    chat_template=CHAT_TEMPLATE,
)
