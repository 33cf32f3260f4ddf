"""Qwen2.5-VL (Bai et al. 2025): Qwen2-VL's decoder behind a tower with window attention."""

from dataclasses import replace

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mmpeft_fast.models.qwen2_vl import QWEN2_VL, TINY_PATCH_SIZE, real_text, tiny_text, token_ids


def _config(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tower_inner=3420, tied: bool = False
) -> Qwen2_5_VLConfig:
    extra = {"max_position_embeddings": 128000, "tie_word_embeddings": tied}
    return Qwen2_5_VLConfig(
        text_config=real_text(hidden, inner, layers, heads, kv_heads, vocab, **extra),
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": tower_inner,
            "num_heads": 16,
            "out_hidden_size": hidden,
        },
        tie_word_embeddings=tied,
    )


def _tiny_config(vocab_size: int, token_id) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config=tiny_text(vocab_size, token_id),
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 256,
            "patch_size": TINY_PATCH_SIZE,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **token_ids(token_id),
    )


QWEN2_5_VL = replace(
    QWEN2_VL,
    name="qwen2_5_vl",
    model_class=Qwen2_5_VLForConditionalGeneration,
    model_types=("qwen2_5_vl",),
    sizes={
        "qwen2.5-vl-3b": lambda: _config(2048, 11008, 36, 16, 2, 151936, tied=True),
        "qwen2.5-vl-7b": lambda: _config(3584, 18944, 28, 28, 4, 152064),
        "qwen2.5-vl-72b": lambda: _config(8192, 29568, 80, 64, 8, 152064, tower_inner=3456),
    },
    tiny_config=_tiny_config,
)
