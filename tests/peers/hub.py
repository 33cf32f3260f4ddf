"""Models that the peers' suites load from the hub, replaced by random ones of the same architecture.

`write_hub(folder)` lays them out as the hub's own cache does, so that the libraries find them by name without a network
and without being patched. Sizes are made up; names are what the suites ask for.
"""

import shutil
import sys
from pathlib import Path

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_VOCABULARY = 1024
_COMMON = {"vocab_size": _VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Widths are powers of two: block sizes and ranks of the suites' adapters have to divide them.
_LLAMA = _COMMON | {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
_GROUPED = _LLAMA | {"num_key_value_heads": 2}
_OPT = _COMMON | {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GPT2 = _COMMON | {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
_T5 = {
    "vocab_size": _VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = _COMMON | {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 512,
}
_GEMMA = _GROUPED | {"hidden_size": 32, "head_dim": 8, "sliding_window": 128}

# name on the hub -> model class, settings of its configuration
MODELS = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", _GEMMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", _GROUPED),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM",
        _OPT | {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_hidden_layers": 12},
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        _COMMON | {"hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", _GPT2 | {"rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", _LLAMA | {"hidden_size": 32}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", _GROUPED | {"head_dim": 8}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
}
# name on the hub -> the model that these LoRA adapters are for
ADAPTERS = {
    "peft-internal-testing/gpt2-lora-random": "hf-internal-testing/tiny-random-gpt2",
    "peft-internal-testing/tiny-OPTForCausalLM-lora": "peft-internal-testing/tiny-random-OPTForCausalLM",
}
_REVISION = "0" * 40
_TEXT = (
    "the quick brown fox jumps over the lazy dog",
    "classify if the tweet is a complaint or not",
    "what is the answer to the question about these words",
)


def snapshot(folder: Path, name: str) -> Path:
    """Where the hub's cache in `folder` keeps the files of a repository."""
    return folder / f"models--{name.replace('/', '--')}" / "snapshots" / _REVISION


def write_hub(folder: Path) -> int:
    """Writes what is missing to a cache folder of the hub; the number of repositories that are there now."""
    tokenizer = _tokenizer()
    for name, (kind, settings) in MODELS.items():
        if not snapshot(folder, name).exists():
            _write(folder, name, _model(kind, settings), tokenizer)
    for name, of in ADAPTERS.items():
        if not snapshot(folder, name).exists():
            torch.manual_seed(0)
            base = transformers.AutoModelForCausalLM.from_pretrained(snapshot(folder, of))
            settings = peft.LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=of, init_lora_weights=False)
            model = peft.get_peft_model(base, settings)
            model.peft_config["default"].base_model_name_or_path = of
            _write(folder, name, model)
    return len(MODELS) + len(ADAPTERS)


def _model(kind: str, settings: dict) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**settings))


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _write(folder: Path, name: str, *parts) -> None:
    """A repository's files, its reference last, so that a killed run leaves none that looks whole."""
    target = snapshot(folder, name)
    part = target.with_name("part")
    shutil.rmtree(part, ignore_errors=True)
    for each in parts:
        each.save_pretrained(part)
    part.rename(target)
    reference = target.parent.parent / "refs" / "main"
    reference.parent.mkdir(exist_ok=True)
    reference.write_text(_REVISION)


if __name__ == "__main__":
    print(write_hub(Path(sys.argv[1])))
