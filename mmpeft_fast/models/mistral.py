"""Mistral 7B (Jiang et al. 2023), text alone: LLaMA's layers; attention over a sliding window in v0.1."""

from dataclasses import replace

from transformers import MistralConfig, MistralForCausalLM

from mmpeft_fast.models.llama import LLAMA, real_text, tiny_text


def text_7b(vocab: int, *, window: int | None, rope_theta: float) -> MistralConfig:
    """Configuration of Mistral 7B. window: keys that a query sees, itself included; None: all before it."""
    return MistralConfig(
        **real_text(4096, 14336, 32, 32, 8, vocab, max_position_embeddings=32768, rms_norm_eps=1e-5),
        sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )


MISTRAL = replace(
    LLAMA,
    name="mistral",
    model_class=MistralForCausalLM,
    model_types=("mistral",),
    sizes={
        "mistral-7b-v0.1": lambda: text_7b(32000, window=4096, rope_theta=1e4),
        "mistral-7b-v0.3": lambda: text_7b(32768, window=None, rope_theta=1e6),
    },
    tiny_config=lambda vocab_size, token_id: MistralConfig(**tiny_text(vocab_size, token_id), sliding_window=None),
)
