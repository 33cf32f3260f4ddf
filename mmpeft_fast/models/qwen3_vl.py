"""Qwen3-VL, dense: head norms on q and k, no projection biases, interleaved mRoPE, deepstack visual features."""

from dataclasses import replace

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mmpeft_fast.models.qwen2_vl import QWEN2_VL, TINY_PATCH_SIZE, real_text, tiny_text, token_ids


def _config(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    extra = {"head_dim": 128, "max_position_embeddings": 262144, "rope_parameters": rope}
    return Qwen3VLConfig(
        text_config=real_text(hidden, inner, layers, heads, kv_heads, 151936, **extra),
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": hidden,
        },
        tie_word_embeddings=False,
    )


def _tiny_config(vocab_size: int, token_id) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config=tiny_text(vocab_size, token_id, head_dim=64, rope_parameters=rope),
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 256,
            "patch_size": TINY_PATCH_SIZE,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=False,
        **token_ids(token_id),
    )


def _sparse_last_layer(config: Qwen3VLConfig) -> bool:
    # Deepstack adds visual features to all positions after each of the first layers.
    return len(config.vision_config.deepstack_visual_indexes) < config.text_config.num_hidden_layers


QWEN3_VL = replace(
    QWEN2_VL,
    name="qwen3_vl",
    model_class=Qwen3VLForConditionalGeneration,
    model_types=("qwen3_vl",),
    connector=("model.visual.merger", "model.visual.deepstack_merger_list.*"),
    sizes={"qwen3-vl-8b": lambda: _config(4096, 12288, 36, 32, 8)},
    tiny_config=_tiny_config,
    sparse_last_layer=_sparse_last_layer,
)
