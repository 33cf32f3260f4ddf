"""The published files as they are: configuration, tensor names and shapes, loading from a folder."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mmpeft_fast.models import FAMILIES, empty_model, family_of, load_pretrained
from mmpeft_fast.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration, QwenVLProcessor
from tests.tiny_models import tiny_model

PUBLISHED_CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": True,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": False,
    "use_logn_attn": True,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
    "vocab_size": 151936,
}


def published_tensors():
    """Names and shapes as the checkpoint's description lists them."""
    decoder = {
        "ln_1.weight": (4096,),
        "attn.c_attn.weight": (12288, 4096),
        "attn.c_attn.bias": (12288,),
        "attn.c_proj.weight": (4096, 4096),
        "ln_2.weight": (4096,),
        "mlp.w1.weight": (11008, 4096),
        "mlp.w2.weight": (11008, 4096),
        "mlp.c_proj.weight": (4096, 11008),
    }
    block = {
        "attn.in_proj.weight": (4992, 1664),
        "attn.in_proj.bias": (4992,),
        "attn.out_proj.weight": (1664, 1664),
        "attn.out_proj.bias": (1664,),
        "mlp.c_fc.weight": (8192, 1664),
        "mlp.c_fc.bias": (8192,),
        "mlp.c_proj.weight": (1664, 8192),
        "mlp.c_proj.bias": (1664,),
    } | {f"ln_{i}.{kind}": (1664,) for i in (1, 2) for kind in ("weight", "bias")}
    visual = {
        "conv1.weight": (1664, 3, 14, 14),
        "positional_embedding": (256, 1664),
        "proj": (4096, 4096),
        "attn_pool.query": (256, 4096),
        "attn_pool.pos_embed": (256, 4096),
        "attn_pool.kv_proj.weight": (4096, 1664),
        "attn_pool.attn.in_proj_weight": (12288, 4096),
        "attn_pool.attn.in_proj_bias": (12288,),
        "attn_pool.attn.out_proj.weight": (4096, 4096),
        "attn_pool.attn.out_proj.bias": (4096,),
    }
    for norm, width in (("ln_pre", 1664), ("ln_post", 4096), ("attn_pool.ln_q", 4096), ("attn_pool.ln_kv", 4096)):
        visual |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    tensors = {"transformer.wte.weight": (151936, 4096), "lm_head.weight": (151936, 4096)}
    tensors["transformer.ln_f.weight"] = (4096,)
    tensors |= {f"transformer.h.{i}.{name}": shape for i in range(32) for name, shape in decoder.items()}
    tensors |= {f"transformer.visual.{name}": shape for name, shape in visual.items()}
    prefix = "transformer.visual.transformer.resblocks"
    return tensors | {f"{prefix}.{i}.{name}": shape for i in range(48) for name, shape in block.items()}


def test_names_and_shapes_are_the_published_ones():
    model = empty_model(FAMILIES["qwen_vl"].sizes["qwen-vl-chat"]())
    expected = published_tensors()
    assert len(expected) == 853
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert family_of(model).name == "qwen_vl"
    assert model.transformer.visual(torch.empty(2, 3, 448, 448, device="meta")).shape == (2, 256, 4096)


def test_published_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIG))
    config = QwenVLConfig.from_pretrained(tmp_path)
    ours = QwenVLConfig()
    for name, value in PUBLISHED_CONFIG.items():
        if name not in ("architectures", "auto_map", "transformers_version", "torch_dtype", "visual"):
            assert getattr(config, name) == value, name
    for name, value in PUBLISHED_CONFIG["visual"].items():
        assert getattr(config.visual, name) == getattr(ours.visual, name) == value, name
    assert config.visual.num_queries == 256 and config.dtype == torch.bfloat16
    config.save_pretrained(tmp_path / "again")
    again = QwenVLConfig.from_pretrained(tmp_path / "again")
    assert again.visual.to_dict() == config.visual.to_dict() and again.seq_length == 2048


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attn_dropout_prob": 0.1}, "expected no dropout, .* got attn_dropout_prob 0.1"),
        ({"no_bias": False}, "no_bias False"),
        ({"rotary_pct": 0.25}, "rotary_pct 0.25"),
        ({"kv_channels": 64}, "hidden_size 4096, 32 heads of 64"),
        ({"visual": {"output_dim": 1024}}, "output_dim 1024"),
        (
            {"visual": {"num_queries": 16, "n_queries": 64}},
            "one number of queries, got num_queries 16 and n_queries 64",
        ),
        ({"visual": {"patch_size": 15}}, "expected an image of whole patches"),
    ],
)
def test_refused_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        QwenVLConfig(**change)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_loads_a_published_folder(form, vocabulary, tmp_path):
    """Shards in the publisher's naming, its `config.json` with classes of its own, and `qwen.tiktoken`."""
    model = tiny_model("qwen_vl", num_layers=1)
    state = model.state_dict()
    names = sorted(state)
    suffix = {"safetensors": "safetensors", "bin": "bin"}[form]
    stem = {"safetensors": "model", "bin": "pytorch_model"}[form]
    index = {"metadata": {}, "weight_map": {}}
    for shard, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{shard:05d}-of-00002.{suffix}"
        tensors = {name: state[name].contiguous() for name in part}
        if form == "bin":
            torch.save(tensors, tmp_path / file)
        else:
            save_file(tensors, tmp_path / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    config = model.config.to_dict()
    keys = {name: config[name] for name in PUBLISHED_CONFIG if name in config}
    visual = {name: config["visual"][name] for name in PUBLISHED_CONFIG["visual"]} | {"n_queries": 16}
    published = PUBLISHED_CONFIG | keys | {"visual": visual, "torch_dtype": "float32"}
    published["architectures"] = ["QWenLMHeadModel"]
    (tmp_path / "config.json").write_text(json.dumps(published))
    settings = {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_new_tokens": 512}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "qwen.tiktoken").write_bytes(vocabulary.path.read_bytes())

    loaded, processor = load_pretrained(str(tmp_path), dtype=torch.float32)
    assert isinstance(loaded, QwenVLForConditionalGeneration) and isinstance(processor, QwenVLProcessor)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.generation_config.eos_token_id == [151643, 151645, 151644]
    assert processor.num_queries == 16 and loaded.config._attn_implementation == "sdpa"


def test_save_and_load(tmp_path):
    model = tiny_model("qwen_vl", num_layers=1)
    model.save_pretrained(tmp_path)
    again = QwenVLForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.visual.num_queries == 16
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
