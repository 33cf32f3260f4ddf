"""LLaVA-NeXT (Liu et al. 2024): an image is seen whole and in tiles, whose features a learned newline ends row by row.

The connector is the projector alone, as in LLaVA's own training; `image_newline` stays frozen like an embedding.
"""

from dataclasses import replace

from transformers import (
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PretrainedConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextCausalLMOutputWithPast

from mmpeft_fast.models.images import Tiled
from mmpeft_fast.models.llama import llama_2_text, tiny_text
from mmpeft_fast.models.llava import CHAT_TEMPLATE, LLAVA, clip_large, clip_tiny
from mmpeft_fast.models.mistral import text_7b

# Tiles of 32 pixels, of 2 x 2 patches.
TINY_TILE = 32
TINY_PATCH_SIZE = 16
TINY_PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def _config(text: PretrainedConfig) -> LlavaNextConfig:
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return LlavaNextConfig(
        vision_config=clip_large(),
        text_config=text,
        image_token_index=32000,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )


def _tiny_config(vocab_size: int, token_id) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=clip_tiny(TINY_TILE, TINY_PATCH_SIZE),
        text_config=LlamaConfig(**tiny_text(vocab_size, token_id)),
        image_token_index=token_id("<image>"),
        image_grid_pinpoints=TINY_PINPOINTS,
        tie_word_embeddings=False,
    )


def _tiny_processor(tokenizer) -> LlavaNextProcessor:
    side = {"height": TINY_TILE, "width": TINY_TILE}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": TINY_TILE}, crop_size=side, image_grid_pinpoints=TINY_PINPOINTS
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=TINY_PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy drops again
        chat_template=CHAT_TEMPLATE,
    )


LLAVA_NEXT = replace(
    LLAVA,
    name="llava_next",
    model_class=LlavaNextForConditionalGeneration,
    processor_class=LlavaNextProcessor,
    model_types=("llava_next",),
    output_class=LlavaNextCausalLMOutputWithPast,
    image=Tiled(),
    image_features=("model.vision_tower", "model.multi_modal_projector", "model.image_newline"),
    sizes={
        "llava-v1.6-vicuna-7b": lambda: _config(LlamaConfig(**llama_2_text(4096, 11008, 32, 32, vocab=32064))),
        "llava-v1.6-mistral-7b": lambda: _config(text_7b(32064, window=None, rope_theta=1e6)),
    },
    tiny_config=_tiny_config,
    tiny_processor=_tiny_processor,
)
