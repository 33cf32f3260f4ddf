"""Qwen-VL-Chat, the original (Bai et al. 2023), which transformers does not have."""

from mmpeft_fast.models.qwen_vl.configuration import QwenVLConfig, QwenVLVisionConfig
from mmpeft_fast.models.qwen_vl.family import QWEN_VL
from mmpeft_fast.models.qwen_vl.modeling import QwenVLForConditionalGeneration, QwenVLModel
from mmpeft_fast.models.qwen_vl.processor import QwenVLProcessor
from mmpeft_fast.models.qwen_vl.tokenizer import load_tokenizer

__all__ = [
    "QWEN_VL",
    "QwenVLConfig",
    "QwenVLForConditionalGeneration",
    "QwenVLModel",
    "QwenVLProcessor",
    "QwenVLVisionConfig",
    "load_tokenizer",
]
