"""Qwen2-VL (Wang et al. 2024): mRoPE, grouped-query attention, biases on q, k, v; also what its successors share."""

from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from mmpeft_fast.models import llama
from mmpeft_fast.models.family import Family
from mmpeft_fast.models.images import PatchGrid

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

# ChatML as the published processors write it; the loss covers what is inside `generation`.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% elif message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TINY_PATCH_SIZE = 8


def token_ids(token_id) -> dict[str, int]:
    """The multimodal token ids that Qwen-VL configurations carry."""
    return {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
    }


def tiny_text(vocab_size: int, token_id, **extra) -> dict:
    """Text configuration shared by the tiny models: mRoPE sections 8, 12, 12 in heads of 64."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    return llama.tiny_text(vocab_size, token_id, eos_token="<|im_end|>", **{"rope_parameters": rope} | extra)


def real_text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **extra) -> dict:
    """Text configuration of a published size."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    usual = {"max_position_embeddings": 32768, "rope_parameters": rope}
    return llama.real_text(hidden, inner, layers, heads, kv_heads, vocab, **usual | extra)


def _config(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config=real_text(hidden, inner, layers, heads, kv_heads, vocab, tie_word_embeddings=tied),
        vision_config={"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": hidden, "mlp_ratio": 4},
        tie_word_embeddings=tied,
    )


def _tiny_config(vocab_size: int, token_id) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config=tiny_text(vocab_size, token_id),
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 4,
            "hidden_size": 256,
            "mlp_ratio": 2,
            "patch_size": TINY_PATCH_SIZE,
            # About Xavier's for this width, as CLIP's are; with the default of 0.02 the tower hardly learns shapes.
            "initializer_range": 0.1,
        },
        tie_word_embeddings=False,
        **token_ids(token_id),
    )


class ImageQwen2VLProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor for text and images alone: the video half needs torchvision, which nothing here uses."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tiny_processor(tokenizer) -> ImageQwen2VLProcessor:
    """64 x 64 pixel images give 8 x 8 patches, merged to 16 tokens."""
    pixels = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    images = Qwen2VLImageProcessorPil(patch_size=TINY_PATCH_SIZE, merge_size=2, size=pixels)
    return ImageQwen2VLProcessor(image_processor=images, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)


QWEN2_VL = Family(
    name="qwen2_vl",
    model_class=Qwen2VLForConditionalGeneration,
    processor_class=ImageQwen2VLProcessor,
    model_types=("qwen2_vl",),
    decoder="model.language_model",
    connector=("model.visual.merger",),
    vision_tower=("model.visual.patch_embed", "model.visual.blocks.*"),
    image_features=("model.visual",),
    image=PatchGrid(),
    output_class=CausalLMOutputWithPast,
    sizes={
        "qwen2-vl-2b": lambda: _config(1536, 8960, 28, 12, 2, 151936, True),
        "qwen2-vl-7b": lambda: _config(3584, 18944, 28, 28, 4, 152064, False),
        "qwen2-vl-72b": lambda: _config(8192, 29568, 80, 64, 8, 152064, False),
    },
    tiny_config=_tiny_config,
    tiny_processor=tiny_processor,
    special_tokens=SPECIAL_TOKENS,
    chat_template=CHAT_TEMPLATE,
)
