"""Small real models and batches for tests, built by the transformers classes from each family's tiny configuration."""

import dataclasses
import functools

import torch
from torch import nn

from mmpeft_fast import METHODS, make_method
from mmpeft_fast.models import FAMILIES

VOCABULARY = 60
TEXT_FAMILIES = tuple(name for name, family in FAMILIES.items() if not family.vision_tower)
_FEW_METHODS = ("lora", "ia3", "prefix")
# The papers' methods run in every family; what is made of the same parts in one of text and one of images.
_PAPERS_METHODS = ("lora", "ia3", "adapter", "prefix", "layernorm", "layernorm-simp")
_OTHERS_FAMILIES = ("llama", "qwen2_vl")
_SMALL = {"r": 4, "alpha": 8, "bottleneck": 4, "num_virtual_tokens": 3, "experts": 2}
# Pixels [height, width] of the samples' images where a family tiles them, the tiles of each and the tokens they become.
_TILED_SIZES = ((64, 64), (40, 64), (32, 32))
_NUM_TILES = (5, 5, 3)
_NUM_IMAGE_TOKENS = {"llava_next": (24, 14, 10), "llava_onevision": (10, 14, 10)}


def small_settings(name: str, *, dropout: float = 0.0) -> dict:
    """A method's settings for a tiny model: small widths, and the dropout where it has one."""
    known = {field.name for field in dataclasses.fields(make_method(name))}
    return {key: value for key, value in (_SMALL | {"dropout": dropout}).items() if key in known}


def family_method_cases(methods) -> list[tuple[str, str]]:
    """Every family with every method of the papers and every variant of one, others in two families; but Mistral, Qwen2
    and Qwen3 with three: they differ from LLaMA, which runs all, in biases on q, k, v, head norms and widths alone."""
    return [
        (family, method)
        for family in FAMILIES
        for method in methods
        if (family == "llama" or family not in TEXT_FAMILIES or method in _FEW_METHODS)
        and (method in _PAPERS_METHODS or method not in METHODS or family in _OTHERS_FAMILIES)
    ]


def token_id(text: str) -> int:
    return _token_ids()[text]


@functools.cache
def _token_ids() -> dict[str, int]:
    names = ["<pad>", "<s>", "</s>", *(token for family in FAMILIES.values() for token in family.special_tokens)]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def first_text_token() -> int:
    """Smaller ids are special tokens."""
    return len(_token_ids())


def tiny_model(family_name: str, *, num_layers: int = 2, dtype=torch.float32, seed: int = 0):
    family = FAMILIES[family_name]
    config = family.tiny_config(VOCABULARY, token_id)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers + (family_name == "qwen3_vl")  # deepstack takes the first two layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = family.model_class(config)
    with torch.no_grad():  # norms at exactly one would hide a forgotten gain
        for name, parameter in model.named_parameters():
            if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype)


def tiny_batch(
    family_name: str, *, batch_size: int = 3, padding_side: str | None = "right", dtype=torch.float32, seed: int = 1
):
    """Text around one image a sample (none in families of text alone), ragged by 0, 3, 5 padding tokens, a few
    supervised tokens at the end."""
    generator = torch.Generator().manual_seed(seed)
    num_image_tokens = _image_tokens(family_name, batch_size)
    length = max(num_image_tokens) + (30 if family_name in TEXT_FAMILIES else 14)
    ids = torch.randint(first_text_token(), VOCABULARY, (batch_size, length), generator=generator)
    image = None if family_name in TEXT_FAMILIES else token_id(_image_token(family_name))
    for b, number in enumerate(num_image_tokens if image is not None else ()):
        ids[b, 2 : 2 + number] = image
        if family_name == "qwen_vl":
            ids[b, 1], ids[b, 2 + number] = token_id("<img>"), token_id("</img>")
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for b in range(batch_size):
        padding = (0, 3, 5)[b % 3] if padding_side else 0
        end = length
        if padding_side == "right":
            end = length - padding
            ids[b, end:], mask[b, end:] = token_id("<pad>"), 0
        elif padding:
            ids[b] = torch.roll(ids[b], padding)
            ids[b, :padding], mask[b, :padding] = token_id("<pad>"), 0
        labels[b, end - 3 - b : end] = ids[b, end - 3 - b : end]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if image is None:
        return batch
    if family_name in _NUM_IMAGE_TOKENS:
        cases = [b % 3 for b in range(batch_size)]
        pixels = torch.randn(batch_size, max(_NUM_TILES[case] for case in cases), 3, 32, 32, generator=generator)
        batch["pixel_values"] = pixels.to(dtype)
        batch["image_sizes"] = torch.tensor([_TILED_SIZES[case] for case in cases])
    elif family_name in ("llava", "qwen_vl", "internvl"):
        batch["pixel_values"] = torch.randn(batch_size, 3, 64, 64, generator=generator).to(dtype)
    else:
        batch["image_grid_thw"] = torch.tensor([[1, 8, 8]] * batch_size)
        batch["pixel_values"] = torch.randn(batch_size * 64, 3 * 2 * 8 * 8, generator=generator).to(dtype)
        batch["mm_token_type_ids"] = (ids == image).int()
    return batch


def _image_token(family_name: str) -> str:
    others = {"qwen_vl": "<imgpad>", "internvl": "<IMG_CONTEXT>"}
    return "<image>" if family_name.startswith("llava") else others.get(family_name, "<|image_pad|>")


def _image_tokens(family_name: str, batch_size: int) -> list[int]:
    """How many tokens stand for each sample's image."""
    if family_name in TEXT_FAMILIES:
        return [0] * batch_size
    numbers = _NUM_IMAGE_TOKENS.get(family_name, (64 if family_name == "llava" else 16,))
    return [numbers[b % len(numbers)] for b in range(batch_size)]


def randomize_trainable(model) -> None:
    """Moves trained parameters off their initial values, so that none of them is zero or one."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (0.05 * noise).to(parameter.dtype)


def loss_and_grads(model, batch):
    """The loss, and gradients of every trained parameter by name."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def judged_together(grads):
    """Gradients by name, those of routers as one: a gate of few experts leaves each a multiple of one vector, whose
    error is a single draw."""
    routers = sorted(name for name in grads if name.endswith(".router"))
    others = {name: grad for name, grad in grads.items() if name not in routers}
    return others | ({"routers": torch.cat([grads[name] for name in routers])} if routers else {})


def materialize_fake(model: nn.Module) -> None:
    """Replaces meta parameters and buffers by fake ones of the active mode's default device."""
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)
