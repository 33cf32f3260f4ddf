"""Data: conversation files, the study's prompts and data set, a trained tokenizer, batches with labels on answers."""

from mmpeft_fast.data.collate import FEATURES, HOST_HINTS, IGNORE_INDEX, Collator, without_hints
from mmpeft_fast.data.conversations import Sample, check_images, data_digest, load_conversations
from mmpeft_fast.data.easy_vqa import easy_vqa_conversations
from mmpeft_fast.data.feature_store import FeatureStore
from mmpeft_fast.data.packing import Packing, Size
from mmpeft_fast.data.shared_context import CONTEXTS, SharedContextCollator, why_not_packed
from mmpeft_fast.data.tokenizer import train_tokenizer

__all__ = [
    "CONTEXTS",
    "FEATURES",
    "HOST_HINTS",
    "IGNORE_INDEX",
    "Collator",
    "FeatureStore",
    "Packing",
    "Sample",
    "SharedContextCollator",
    "Size",
    "check_images",
    "data_digest",
    "easy_vqa_conversations",
    "load_conversations",
    "train_tokenizer",
    "why_not_packed",
    "without_hints",
]
