"""Gradients that go through a vision tower, frozen or trained in part: fused as unfused."""

import pytest
import torch
from torch import nn

from mmpeft_fast import LoRA, add_peft, fuse
from mmpeft_fast.measure import saved_bytes
from mmpeft_fast.models import FAMILIES
from tests.closeness import assert_same_in_double
from tests.tiny_models import TEXT_FAMILIES, randomize_trainable, tiny_batch, tiny_model

TOWERS = [name for name in FAMILIES if name not in TEXT_FAMILIES]
BLOCKS = {"qwen_vl": "transformer.visual.transformer.resblocks", "llava": "model.vision_tower.encoder.layers"}
BLOCKS |= dict.fromkeys(("llava_next", "llava_onevision"), BLOCKS["llava"])
BLOCKS["internvl"] = "model.vision_tower.encoder.layer"


def blocks_of(model, family):
    return model.get_submodule(BLOCKS.get(family, "model.visual.blocks"))


def embedding_of(model, family):
    names = {"llava": "model.vision_tower.embeddings", "qwen_vl": "transformer.visual.conv1"}
    names["internvl"] = names["llava"]
    return model.get_submodule(
        names.get(family.split("_")[0] if "llava" in family else family, "model.visual.patch_embed")
    )


def leaf_pixels(model, batch, family):
    batch["pixel_values"].requires_grad_()
    return {"pixels": batch["pixel_values"]}


class Prompt(nn.Module):
    """A trained offset on what a block reads, added by a hook and registered nowhere in the tower."""

    def __init__(self, width):
        super().__init__()
        self.offset = nn.Parameter(torch.linspace(-0.5, 0.5, width, dtype=torch.float64))

    def __call__(self, module, args):
        return args[0] + self.offset, *args[1:]


def hooked_prompt(model, batch, family):
    block = blocks_of(model, family)[1]
    prompt = Prompt(next(p.shape[-1] for p in block.parameters() if p.dim() == 1))
    block.register_forward_pre_hook(prompt)
    return {"prompt": prompt.offset}


def first_block(model, batch, family):
    blocks_of(model, family)[0].requires_grad_(True)


def patch_embedding(model, batch, family):
    embedding_of(model, family).requires_grad_(True)


def last_block(model, batch, family):
    blocks_of(model, family)[1].requires_grad_(True)


def biases(model, batch, family):
    for name, parameter in blocks_of(model, family).named_parameters():
        parameter.requires_grad_(name.startswith("0.") and name.endswith("bias"))


def whole_tower(model, batch, family):
    blocks_of(model, family).requires_grad_(True)
    embedding_of(model, family).requires_grad_(True)


TRAINED = [leaf_pixels, hooked_prompt, first_block, patch_embedding, last_block, biases, whole_tower]
# How the gradients are asked for besides: nothing, transformers' mark on embeddings, checkpointing of either kind.
MODES = {"plain": None, "marked": None, "checkpointed": False, "re-entrant": True}


def step(family, train, mode, is_fused):
    """Loss and all gradients of a float64 model in which nothing but `train`'s choice and a LoRA is trained."""
    model = add_peft(tiny_model(family, num_layers=1, dtype=torch.float64), LoRA(r=2, dropout=0.0, targets=("o",)))
    randomize_trainable(model)
    batch = tiny_batch(family, dtype=torch.float64)
    more = train(model, batch, family) or {}
    if is_fused:
        fuse(model)
    if mode != "plain":
        model.enable_input_require_grads()
    if MODES[mode] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": MODES[mode]})
    loss = model.train()(**batch).loss
    loss.backward()
    grads = {name: p.grad for name, p in (*model.named_parameters(), *more.items()) if p.grad is not None}
    return loss, grads


CASES = [(family, train, "plain") for family in TOWERS for train in (leaf_pixels, hooked_prompt, first_block)]
CASES += [("qwen2_vl", train, mode) for train in TRAINED for mode in MODES if (train, mode) not in CASES]
CASES += [(family, train, "re-entrant") for family in ("llava", "qwen2_5_vl") for train in (hooked_prompt, last_block)]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("family", "train", "mode"), list(dict.fromkeys(CASES)), ids=lambda x: getattr(x, "__name__", x)
)
def test_fused_as_unfused(family, train, mode):
    (loss, grads), (expected_loss, expected) = (step(family, train, mode, is_fused) for is_fused in (True, False))
    assert_same_in_double(loss, expected_loss)
    assert grads.keys() == expected.keys()
    tower = [name for name in grads if "branches" not in name]
    assert tower, "nothing in the tower got a gradient"
    largest = max(torch.linalg.vector_norm(expected[name]) for name in tower)
    for name, grad in grads.items():
        if (
            torch.linalg.vector_norm(expected[name]) > torch.finfo(torch.float32).eps * largest
        ):  # keys' biases have none
            assert_same_in_double(grad, expected[name], name)


@pytest.mark.parametrize("family", TOWERS)
def test_frozen_tower_keeps_nothing(family):
    """`enable_input_require_grads()` marks embeddings of towers as well; nobody reads those gradients."""
    model = fuse(add_peft(tiny_model(family), LoRA(r=2)))
    batch = tiny_batch(family)
    with saved_bytes(model) as plain:
        model.train()(**batch)
    model.enable_input_require_grads()
    with saved_bytes(model) as marked:
        model(**batch)
    text = batch["input_ids"].numel() * model.config.get_text_config().hidden_size
    assert marked.bytes - plain.bytes <= 8 * text * 4  # the first layer's inputs now need gradients


def test_what_the_mark_is_needed_for():
    """A hook, a forward or a tensor of somebody else's in the tower: the mark stays."""
    modifications = {
        "nothing": lambda blocks: None,
        "a hook": lambda blocks: blocks[1].register_forward_hook(lambda *_: None),
        "a forward": lambda blocks: setattr(blocks[1].mlp, "forward", blocks[1].mlp.forward),
        "a class": lambda blocks: setattr(
            blocks[1].mlp, "__class__", type("M", (type(blocks[1].mlp),), {"forward": lambda self, x: x})
        ),
        "a tensor": lambda blocks: setattr(blocks[1], "prompt", torch.zeros(1, requires_grad=True)),
        "a parameter": lambda blocks: blocks[1].attn.qkv.bias.requires_grad_(True),
    }
    for name, modify in modifications.items():
        model = fuse(tiny_model("qwen2_vl").requires_grad_(False))
        model.enable_input_require_grads()
        modify(model.model.visual.blocks)
        seen = []
        model.model.visual.merger.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].requires_grad)
        )
        model(**tiny_batch("qwen2_vl"))
        assert seen == [name != "nothing"], name
