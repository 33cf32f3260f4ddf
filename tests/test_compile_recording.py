"""Attentions that transformers records under torch.compile: its hooks still run after fused code looked at them."""

import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from mmpeft_fast import fuse


def test_compiled_generation_records_attentions():
    torch.compiler.reset()
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, attn_implementation="eager")
    model = fuse(LlamaForCausalLM(config).eval())
    compiling = CompileConfig()
    compiling._compile_all_devices = True
    generated = model.generate(
        torch.arange(1, 6)[None], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0,
        cache_implementation="static", compile_config=compiling, return_dict_in_generate=True,
        output_attentions=True, output_hidden_states=True,
    )  # fmt: skip
    assert [len(step) for step in generated.attentions] == [2, 2, 2]
