"""A folder that `save_pretrained` wrote loads again, model and processor, and what is missing is named."""

import pytest
import torch

from mmpeft_fast.data import HOST_HINTS, Collator, Sample, train_tokenizer
from mmpeft_fast.models import FAMILIES, family_of, load_pretrained, tiny_model, tiny_processor

FAMILY_NAMES = ["llava_next", "llava_onevision", "internvl", "llama", "mistral", "qwen2", "qwen3"]
SAMPLES = [Sample(id="0", questions=("why?",), answers=("because",))]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_saved_folder_gives_the_same_model_and_batch(name, tmp_path):
    tokenizer = train_tokenizer(SAMPLES, FAMILIES[name].special_tokens)
    model, processor = tiny_model(name, tokenizer, seed=0), tiny_processor(name, tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = load_pretrained(str(tmp_path), dtype=torch.float32)
    assert family_of(loaded) is FAMILIES[name]
    assert loaded.config._attn_implementation == "sdpa"
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    batch, again = Collator(processor)(SAMPLES), Collator(loaded_processor)(SAMPLES)
    assert set(batch) == set(again) and torch.equal(batch["input_ids"], again["input_ids"])
    inputs = {key: value for key, value in batch.items() if key not in HOST_HINTS}
    assert torch.equal(loaded.eval()(**inputs).loss, model.eval()(**inputs).loss)


def test_a_model_without_its_tokenizer(tmp_path):
    tokenizer = train_tokenizer(SAMPLES, FAMILIES["llama"].special_tokens)
    tiny_model("llama", tokenizer, seed=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot load a model and its processor from folder"):
        load_pretrained(str(tmp_path), dtype=torch.float32)


def test_a_model_without_a_language_head_is_refused():
    tokenizer = train_tokenizer(SAMPLES, ())
    with pytest.raises(ValueError, match="expected a LlamaForCausalLM, got LlamaModel"):
        family_of(tiny_model("llama", tokenizer, seed=0).model)


def test_tiny_processors_of_text_leave_the_tokenizer_alone():
    tokenizer = train_tokenizer(SAMPLES, ())
    processor = tiny_processor("llama", tokenizer)
    assert processor.chat_template == FAMILIES["llama"].chat_template and tokenizer.chat_template is None
    with pytest.raises(ValueError, match=r"lacks special tokens \['<\|im_start\|>', '<\|im_end\|>'\]"):
        tiny_model("qwen3", tokenizer, seed=0)
