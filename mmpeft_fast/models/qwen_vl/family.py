"""Qwen-VL-Chat as a family: where its parts are, the study's settings for it, and configurations."""

from transformers.modeling_outputs import CausalLMOutputWithPast

from mmpeft_fast.layers.decoder_paths import DecoderPaths
from mmpeft_fast.models.family import Family
from mmpeft_fast.models.images import Resampled
from mmpeft_fast.models.qwen_vl import publishers
from mmpeft_fast.models.qwen_vl.configuration import QwenVLConfig
from mmpeft_fast.models.qwen_vl.images import image_processor
from mmpeft_fast.models.qwen_vl.modeling import QwenVLForConditionalGeneration
from mmpeft_fast.models.qwen_vl.processor import QwenVLProcessor
from mmpeft_fast.models.qwen_vl.tokenizer import CHAT_TEMPLATE
from mmpeft_fast.models.qwen_vl.tokens import IMAGE_END, IMAGE_PAD, IMAGE_START, TURN_END, TURN_START

_TINY_IMAGE_SIZE = 64
_TINY_NUM_QUERIES = 16


def _tiny_config(vocab_size: int, token_id) -> QwenVLConfig:
    return QwenVLConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        kv_channels=64,
        intermediate_size=2 * 344,
        max_position_embeddings=2048,
        seq_length=512,
        visual={
            "image_size": _TINY_IMAGE_SIZE,
            "patch_size": 8,
            "width": 64,
            "layers": 2,
            "heads": 4,
            "mlp_ratio": 2.0,
            "output_dim": 256,
            "num_queries": _TINY_NUM_QUERIES,
            "image_start_id": token_id(IMAGE_START),
        },
        pad_token_id=token_id("<pad>"),
        eos_token_id=token_id(TURN_END),
    )


def _tiny_processor(tokenizer) -> QwenVLProcessor:
    return QwenVLProcessor(
        image_processor(_TINY_IMAGE_SIZE), tokenizer, chat_template=CHAT_TEMPLATE, num_queries=_TINY_NUM_QUERIES
    )


QWEN_VL = Family(
    name="qwen_vl",
    model_class=QwenVLForConditionalGeneration,
    processor_class=QwenVLProcessor,
    model_types=("qwen",),
    decoder="transformer",
    paths=DecoderPaths(
        roles={
            "qkv": "attn.c_attn",
            "o": "attn.c_proj",
            "gate": "mlp.w2",
            "up": "mlp.w1",
            "down": "mlp.c_proj",
            "input_norm": "ln_1",
            "post_attention_norm": "ln_2",
        },
        layers="h",
        norm="ln_f",
        attention="attn",
        activation=None,
    ),
    connector=("lm_head", "transformer.wte"),  # what the study's script for Qwen-VL trains under that name
    vision_tower=("transformer.visual", "transformer.visual.transformer.resblocks.*"),
    image=Resampled(),
    why_no_vision_cache="Qwen-VL's decoder runs its tower itself",
    why_not_packed="its images are found by rows",
    output_class=CausalLMOutputWithPast,
    sizes={"qwen-vl-chat": QwenVLConfig},
    tiny_config=_tiny_config,
    tiny_processor=_tiny_processor,
    special_tokens=(TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_PAD),
    chat_template=CHAT_TEMPLATE,
    method_settings={
        "lora": {"targets": ("qkv", "o", "gate", "up")},
        "adapter": {"targets": ("o", "gate", "up")},
        "ia3": {"targets": ("o", "down")},
    },
    is_publishers=publishers.is_publishers,
    adopt=publishers.adopt,
)
