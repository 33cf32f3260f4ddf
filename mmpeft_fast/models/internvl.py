"""InternVL3 (Zhu et al. 2025): InternViT, pixel shuffle and a two-layer connector, Qwen2; images cut into tiles."""

import re

from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor, Qwen2Config
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast
from transformers.processing_utils import ProcessorMixin

from mmpeft_fast.models.family import Family
from mmpeft_fast.models.images import Cropped
from mmpeft_fast.models.llama import tiny_text
from mmpeft_fast.models.qwen2 import text as qwen2_text
from mmpeft_fast.models.qwen2_vl import CHAT_TEMPLATE as QWEN2_VL_CHAT_TEMPLATE

_START, _END, _FEATURE, _VIDEO = "<img>", "</img>", "<IMG_CONTEXT>", "<video>"
CHAT_TEMPLATE = QWEN2_VL_CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", f"{_FEATURE}\\n")
_TINY_TILE, _TINY_PATCH_SIZE = 64, 8
_TINY_FEATURES = 16  # 8 x 8 patches, four of which become one token


def _config(text: Qwen2Config) -> InternVLConfig:
    """With InternViT-300M, the tower of the sizes up to 14B."""
    vision = InternVLVisionConfig(attention_bias=True)
    return InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=text.tie_word_embeddings)


def _tiny_config(vocab_size: int, token_id) -> InternVLConfig:
    vision = InternVLVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
        image_size=_TINY_TILE,
        patch_size=_TINY_PATCH_SIZE,
    )
    return InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**tiny_text(vocab_size, token_id, eos_token="<|im_end|>")),
        image_token_id=token_id(_FEATURE),
        image_seq_length=_TINY_FEATURES,
        tie_word_embeddings=False,
    )


class ImageInternVLProcessor(InternVLProcessor):
    """InternVL's processor for text and images alone: the video half needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=256, chat_template=None, **kwargs):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_seq_length = image_seq_length
        self.start_image_token, self.end_image_token = _START, _END
        self.image_token, self.video_token = _FEATURE, _VIDEO
        ids = tokenizer.convert_tokens_to_ids([_START, _END, _FEATURE])
        self.start_image_token_id, self.end_image_token_id, self.image_token_id = ids
        self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(_FEATURE)})")


def _tiny_processor(tokenizer) -> ImageInternVLProcessor:
    side = {"height": _TINY_TILE, "width": _TINY_TILE}
    return ImageInternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=side),
        tokenizer=tokenizer,
        image_seq_length=_TINY_FEATURES,
        chat_template=CHAT_TEMPLATE,
    )


INTERNVL = Family(
    name="internvl",
    model_class=InternVLForConditionalGeneration,
    processor_class=ImageInternVLProcessor,
    model_types=("internvl",),
    decoder="model.language_model",
    connector=("model.multi_modal_projector",),
    vision_tower=("model.vision_tower",),
    why_no_vision_cache="its features do not say which tiles are of one image",
    image=Cropped(),
    output_class=InternVLCausalLMOutputWithPast,
    sizes={
        "internvl3-1b": lambda: _config(qwen2_text(896, 4864, 24, 14, 2, 151674, tied=False)),
        "internvl3-2b": lambda: _config(qwen2_text(1536, 8960, 28, 12, 2, 151674, tied=False)),
        "internvl3-8b": lambda: _config(qwen2_text(3584, 18944, 28, 28, 4, 151674, tied=False)),
        "internvl3-14b": lambda: _config(qwen2_text(5120, 13824, 48, 40, 8, 151674, tied=False)),
    },
    tiny_config=_tiny_config,
    tiny_processor=_tiny_processor,
    special_tokens=("<|im_start|>", "<|im_end|>", _START, _END, _FEATURE),
    chat_template=CHAT_TEMPLATE,
)
