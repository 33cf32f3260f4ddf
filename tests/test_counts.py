"""Trainable parameters at real sizes equal the papers' tables (arXiv 2406.05130 table 15; arXiv 2312.11420)."""

import pytest
from torch import nn

from mmpeft_fast import add_peft, make_method
from mmpeft_fast.models import FAMILIES, empty_model
from mmpeft_fast.peft_model import study_method

CONNECTOR = {"llava-1.5-7b": 20_979_712, "llava-1.5-13b": 31_467_520}
TRAINABLE = {
    "llava-1.5-7b": {
        ("adapter",): 201_326_592,
        ("lora",): 319_815_680,
        ("ia3",): 614_400,
        ("prefix",): 5_242_880,
        ("layernorm-simp",): 262_144,
        ("lora", ("r", 16)): 39_976_960,
        ("lora", ("r", 32)): 79_953_920,
        ("lora", ("r", 64)): 159_907_840,
        ("lora", ("targets", "attention")): 134_217_728,
        ("lora", ("targets", "mlp")): 185_597_952,
        ("adapter", ("bottleneck", 32)): 25_165_824,
        ("adapter", ("bottleneck", 64)): 50_331_648,
        ("adapter", ("bottleneck", 128)): 100_663_296,
        ("prefix", ("num_virtual_tokens", 10)): 2_621_440,
        ("prefix", ("num_virtual_tokens", 40)): 10_485_760,
        ("prefix", ("projection", True)): 1_090_867_200,
        # The seven linear layers take 6 x 4,096 + 11,008 = 35,584 numbers in and give 5 x 4,096 + 2 x 11,008 = 42,496.
        ("sharelora",): 64 * (35_584 + 32 * 42_496),
        ("sharelora", ("shared", "up")): 64 * (32 * 35_584 + 42_496),
        ("sharelora", ("shared", "both")): 64 * 78_080,
        ("msplora",): (64 + 4 * 32 + 32 * 16) * 78_080,
        ("msplora", ("group_layers", 5)): (64 + 7 * 32 + 32 * 16) * 78_080,
        ("moelora",): 32 * (16 * 78_080 + 7 * 8 * 64) + 8 * 64,
        ("lora-fa",): 32 * 128 * 42_496,
        ("dora",): 319_815_680 + 32 * 42_496,
        ("vera",): 32 * (7 * 256 + 42_496),
        ("vera", ("r", 64), ("targets", ("q", "down"))): 32 * (2 * 64 + 2 * 4_096),
    },
    "llava-1.5-13b": {
        ("adapter",): 314_572_800,
        ("lora",): 500_695_040,
        ("ia3",): 962_560,
        ("prefix",): 8_192_000,
        ("layernorm-simp",): 409_600,
        ("prefix", ("projection", True)): 2_123_883_520,
    },
}
# Qwen-VL-Chat with the study's settings for it, and the part of them that its script calls the connector.
QWEN_VL = {"adapter": 201_326_592, "lora": 224_395_264, "ia3": 483_328, "prefix": 5_242_880}
QWEN_VL_CONNECTOR = 1_244_659_712  # lm_head and wte
# What the published checkpoints hold; a head that is tied to the embeddings counts once.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "llava-v1.6-vicuna-7b": 7_063_431_168,
    "llava-v1.6-mistral-7b": 7_566_747_648,
    "llava-onevision-7b": 8_030_348_832,
    "qwen2.5-vl-72b": 73_410_777_344,
}
CASES = [(size, key, count) for size, counts in TRAINABLE.items() for key, count in counts.items()]
# Percentages of the study's table 15, frozen and tuned connector.
PERCENT = {
    "llava-1.5-7b": {
        "adapter": (2.771, 3.060),
        "lora": (4.332, 4.616),
        "ia3": (0.0087, 0.306),
        "prefix": (0.074, 0.371),
    },
    "llava-1.5-13b": {
        "adapter": (2.301, 2.532),
        "lora": (3.615, 3.842),
        "ia3": (0.0072, 0.243),
        "prefix": (0.061, 0.297),
    },
}


def built(size, method, *, train_connector=False, change=None):
    config = FAMILIES["llava"].sizes[size]()
    if change:
        change(config)
    model = empty_model(config)
    return add_peft(model, method, train_connector=train_connector)


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def trained(model):
    return count(parameter for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("size, key, expected", CASES, ids=str)
def test_trainable_parameters(size, key, expected):
    name, *settings = key
    model = built(size, make_method(name, **dict(settings)))
    assert trained(model) == expected
    assert count(model.model.multi_modal_projector.parameters()) == CONNECTOR[size]


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters_of_published_sizes(size):
    (config,) = [family.sizes[size]() for family in FAMILIES.values() if size in family.sizes]
    assert count(empty_model(config).parameters()) == PARAMETERS[size]


def test_a_decoder_alone_trains_what_it_trains_inside_llava():
    model = empty_model(FAMILIES["llama"].sizes["llama-2-7b"]())
    assert trained(add_peft(model, make_method("lora"))) == TRAINABLE["llava-1.5-7b"][("lora",)]


@pytest.mark.parametrize("size", PERCENT)
@pytest.mark.parametrize("method", ["adapter", "lora", "ia3", "prefix"])
@pytest.mark.parametrize("tuned", [False, True])
def test_percentages_of_the_study(size, method, tuned):
    def vicuna_vocabulary(config):  # the study's checkpoints have 32,000 words
        config.text_config.vocab_size = 32000

    model = built(size, make_method(method), train_connector=tuned, change=vicuna_vocabulary)
    percent = 100 * trained(model) / count(model.parameters())
    published = PERCENT[size][method][tuned]
    digits = len(str(published).split(".")[1])
    assert abs(percent - published) <= 1.5 * 10**-digits


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("method", QWEN_VL)
def test_qwen_vl_chat(method, tuned):
    model = empty_model(FAMILIES["qwen_vl"].sizes["qwen-vl-chat"]())
    add_peft(model, study_method(model, method), train_connector=tuned)
    assert trained(model) == QWEN_VL[method] + tuned * QWEN_VL_CONNECTOR
    assert not any(parameter.requires_grad for parameter in model.transformer.visual.parameters())


@pytest.mark.parametrize("size, expected", [("llava-1.5-7b", 266_604_544), ("llava-1.5-13b", 333_337_600)])
def test_layernorm_with_linear_connector_embeddings_and_head(size, expected):
    config = FAMILIES["llava"].sizes[size]()
    config.text_config.vocab_size = 32000
    model = empty_model(config)
    width = config.text_config.hidden_size
    model.model.multi_modal_projector = nn.Linear(config.vision_config.hidden_size, width, device="meta")
    assert trained(add_peft(model, make_method("layernorm"))) == expected
