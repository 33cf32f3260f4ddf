"""LLaVA-OneVision (Li et al. 2024): LLaVA-NeXT's tiles with a cap on their features, SigLIP, Qwen2, and videos."""

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionCausalLMOutputWithPast
from transformers.processing_utils import ProcessorMixin

from mmpeft_fast.models.family import Family
from mmpeft_fast.models.images import Tiled
from mmpeft_fast.models.llama import tiny_text
from mmpeft_fast.models.llava_next import TINY_PATCH_SIZE, TINY_PINPOINTS, TINY_TILE
from mmpeft_fast.models.qwen2 import text as qwen2_text
from mmpeft_fast.models.qwen2_vl import CHAT_TEMPLATE as QWEN2_VL_CHAT_TEMPLATE

CHAT_TEMPLATE = QWEN2_VL_CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>\\n")
# Tiles give at most as many features as two whole images: low enough for tiny images to be shrunk.
_TINY_ASPECT_RATIO = "anyres_max_2"


def _config(text: Qwen2Config) -> LlavaOnevisionConfig:
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,  # of so400m's 27: the last one's output is not used
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    sides = range(384, 2304 + 1, 384)
    pinpoints = [[height, width] for height in sides for width in sides]
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _tiny_config(vocab_size: int, token_id) -> LlavaOnevisionConfig:
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=TINY_TILE,
        patch_size=TINY_PATCH_SIZE,
        vision_use_head=False,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**tiny_text(vocab_size, token_id, eos_token="<|im_end|>")),
        image_token_index=token_id("<image>"),
        video_token_index=token_id("<video>"),
        image_grid_pinpoints=TINY_PINPOINTS,
        vision_aspect_ratio=_TINY_ASPECT_RATIO,
        tie_word_embeddings=False,
    )


class ImageLlavaOnevisionProcessor(LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor for text and images alone: the video half needs torchvision."""

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio="anyres_max_9",
        **kwargs,
    ):
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.vision_aspect_ratio = vision_aspect_ratio
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([image_token, video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _tiny_processor(tokenizer) -> ImageLlavaOnevisionProcessor:
    side = {"height": TINY_TILE, "width": TINY_TILE}
    return ImageLlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=TINY_PINPOINTS),
        tokenizer=tokenizer,
        num_image_tokens=(TINY_TILE // TINY_PATCH_SIZE) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        vision_aspect_ratio=_TINY_ASPECT_RATIO,
    )


LLAVA_ONEVISION = Family(
    name="llava_onevision",
    model_class=LlavaOnevisionForConditionalGeneration,
    processor_class=ImageLlavaOnevisionProcessor,
    model_types=("llava_onevision",),
    decoder="model.language_model",
    connector=("model.multi_modal_projector",),  # not `image_newline`, see llava_next
    vision_tower=("model.vision_tower",),
    image_features=("model.vision_tower", "model.multi_modal_projector", "model.image_newline"),
    image=Tiled(),
    output_class=LlavaOnevisionCausalLMOutputWithPast,
    sizes={"llava-onevision-7b": lambda: _config(qwen2_text(3584, 18944, 28, 28, 4, 152064, tied=False))},
    tiny_config=_tiny_config,
    tiny_processor=_tiny_processor,
    special_tokens=("<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    chat_template=CHAT_TEMPLATE,
)
