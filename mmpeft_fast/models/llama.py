"""LLaMA (Touvron et al. 2023; Grattafiori et al. 2024), text alone; also what other families of text alone share."""

import copy

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmpeft_fast.models.family import Family
from mmpeft_fast.models.llava import CHAT_TEMPLATE

_LLAMA_3_1_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny_text(vocab_size: int, token_id, *, eos_token: str = "</s>", **extra) -> dict:
    """Configuration of a tiny decoder: grouped-query attention, head dim 64."""
    return {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "pad_token_id": token_id("<pad>"),
        "bos_token_id": token_id("<s>"),
        "eos_token_id": token_id(eos_token),
        "tie_word_embeddings": False,
    } | extra


def real_text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **extra) -> dict:
    """Configuration of a decoder of a published size."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    } | extra


def llama_2_text(hidden: int, inner: int, layers: int, heads: int, *, vocab: int = 32000) -> dict:
    """Configuration of LLaMA 2, and of Vicuna v1.5, which was made of it."""
    return real_text(
        hidden, inner, layers, heads, heads, vocab, max_position_embeddings=4096, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip


def _llama_3_1() -> LlamaConfig:
    extra = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_parameters": dict(_LLAMA_3_1_ROPE)}
    return LlamaConfig(**real_text(4096, 14336, 32, 32, 8, 128256, **extra))


def tokenizer_with(chat_template: str):
    """A `tiny_processor` of text alone: the tokenizer itself, given a chat template."""

    def tiny_processor(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = chat_template
        return tokenizer

    return tiny_processor


LLAMA = Family(
    name="llama",
    model_class=LlamaForCausalLM,
    processor_class=AutoTokenizer,
    model_types=("llama",),
    decoder="model",
    output_class=CausalLMOutputWithPast,
    sizes={
        "llama-2-7b": lambda: LlamaConfig(**llama_2_text(4096, 11008, 32, 32)),
        "llama-2-13b": lambda: LlamaConfig(**llama_2_text(5120, 13824, 40, 40)),
        "llama-3.1-8b": _llama_3_1,
    },
    tiny_config=lambda vocab_size, token_id: LlamaConfig(**tiny_text(vocab_size, token_id)),
    tiny_processor=tokenizer_with(CHAT_TEMPLATE),
    special_tokens=(),
    chat_template=CHAT_TEMPLATE,
)
