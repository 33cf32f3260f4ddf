"""LLaVA-1.5 (Liu et al. 2023) and ShareGPT4V, which has the same shape: CLIP tower, two-layer connector, LLaMA."""

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from mmpeft_fast.models.family import Family
from mmpeft_fast.models.images import Square

# Vicuna v1, the template of the study; the loss covers what is inside `generation`.
CHAT_TEMPLATE = (
    "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %} USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} ASSISTANT:"
    "{% else %}{% generation %} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)


def clip_large() -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels (Radford et al. 2021), the tower of LLaVA-1.5 and LLaVA-NeXT."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def clip_tiny(image_size: int, patch_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=64,
    )


def _config(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int) -> LlavaConfig:
    text = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        vocab_size=32064,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    return LlavaConfig(vision_config=clip_large(), text_config=text, image_token_index=32000, image_seq_length=576)


def _tiny_config(vocab_size: int, token_id) -> LlavaConfig:
    text = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        pad_token_id=token_id("<pad>"),
        bos_token_id=token_id("<s>"),
        eos_token_id=token_id("</s>"),
    )
    return LlavaConfig(
        vision_config=clip_tiny(64, 8),
        text_config=text,
        image_token_index=token_id("<image>"),
        image_seq_length=64,
    )


def _tiny_processor(tokenizer) -> LlavaProcessor:
    side = {"height": 64, "width": 64}
    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=side)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy drops again
        chat_template=CHAT_TEMPLATE,
    )


LLAVA = Family(
    name="llava",
    model_class=LlavaForConditionalGeneration,
    processor_class=LlavaProcessor,
    model_types=("llava",),
    decoder="model.language_model",
    connector=("model.multi_modal_projector",),
    vision_tower=("model.vision_tower",),
    image_features=("model.vision_tower", "model.multi_modal_projector"),
    image=Square(),
    output_class=LlavaCausalLMOutputWithPast,
    sizes={
        "llava-1.5-7b": lambda: _config(4096, 11008, 32, 32),
        "llava-1.5-13b": lambda: _config(5120, 13824, 40, 40),
    },
    tiny_config=_tiny_config,
    tiny_processor=_tiny_processor,
    special_tokens=("<image>",),
    chat_template=CHAT_TEMPLATE,
)
