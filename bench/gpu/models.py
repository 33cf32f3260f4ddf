"""Randomly initialised models of real sizes, built on the device itself, with a PEFT method by every implementation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.gpu import peers
from bench.gpu.timing import on_provider
from mmpeft_fast import LoRA, add_peft, fuse
from mmpeft_fast.baseline import add_baseline
from mmpeft_fast.models import FAMILIES, base_model
from mmpeft_fast.ops.providers import PROVIDERS

_SCALING = 2.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, its batch and its method; `num_layers` is the model's own where None.

    size: of `Family.sizes`, or "tiny". Every sample has one image of `num_image_tokens` (0: none); its last
    `supervised` share carries labels.
    """

    name: str
    family: str
    size: str
    batch_size: int
    length: int
    num_image_tokens: int
    supervised: float
    r: int
    dropout: float
    num_layers: int | None = None


_LLAVA = {
    "family": "llava", "size": "llava-1.5-7b", "batch_size": 4, "length": 700, "num_image_tokens": 576,
    "supervised": 0.05,
}  # fmt: skip
_QWEN = {"family": "qwen2_5_vl", "size": "qwen2.5-vl-7b", "r": 16}
SETTINGS = (
    Setting(name="llava-1.5-7b lora r128 4x700", r=128, dropout=0.05, **_LLAVA),
    Setting(
        name="qwen2.5-vl-7b lora r16 1x2048", batch_size=1, length=2048, num_image_tokens=1024, supervised=0.05,
        dropout=0.05, **_QWEN,
    ),
    Setting(
        name="qwen2.5-vl-7b lora r16 2x4096 text", batch_size=2, length=4096, num_image_tokens=0, supervised=1.0,
        dropout=0.0, **_QWEN,
    ),
    Setting(name="llava-1.5-7b lora r128 4x700, 8 layers", r=128, dropout=0.05, num_layers=8, **_LLAVA),
    Setting(
        name="qwen2.5-vl-7b lora r16 2x4096 text, 8 layers", batch_size=2, length=4096, num_image_tokens=0,
        supervised=1.0, dropout=0.0, num_layers=8, **_QWEN,
    ),
)  # fmt: skip


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(setting: Setting, dtype: torch.dtype, device: str) -> nn.Module:
    """The stock model, initialised by transformers in `dtype` on the device: no second copy anywhere."""
    family = FAMILIES[setting.family]
    if setting.size == "tiny":
        ids = {text: i for i, text in enumerate(("<pad>", "<s>", "</s>", *family.special_tokens))}
        config = family.tiny_config(64, ids.__getitem__)
    else:
        config = family.sizes[setting.size]()
    if setting.num_layers is not None:
        text = config.text_config
        text.num_hidden_layers = setting.num_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: setting.num_layers]
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with _default_dtype(dtype), torch.device(device):
        return family.model_class(config)


def batch(setting: Setting, config, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random tokens, an image a sample where there is one, no padding."""
    torch.manual_seed(1)
    size = (setting.batch_size, setting.length)
    vocab = config.text_config.vocab_size
    image = getattr(config, "image_token_index", None) or getattr(config, "image_token_id", None)
    ids = torch.randint(vocab // 2, vocab, size, device=device)
    ids = torch.where(ids == image, vocab // 2 - 1, ids)
    labels = ids.clone()
    labels[:, : round(setting.length * (1 - setting.supervised))] = -100
    inputs = {"input_ids": ids, "labels": labels}
    count, vision = setting.num_image_tokens, config.vision_config
    if not count:
        return inputs
    ids[:, 0] = getattr(config, "vision_start_token_id", None) or vocab // 2
    ids[:, 1 : 1 + count] = image
    if setting.family == "llava":
        side = vision.image_size
        return {**inputs, "pixel_values": torch.randn(setting.batch_size, 3, side, side, dtype=dtype, device=device)}
    height = round((4 * count) ** 0.5)  # four patches a token
    patches, width = setting.batch_size * 4 * count, 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        **inputs,
        "pixel_values": torch.randn(patches, width, dtype=dtype, device=device),
        "image_grid_thw": torch.tensor([[1, height, 4 * count // height]] * setting.batch_size, device=device),
        "mm_token_type_ids": (ids == image).int(),
    }


FUSED = (*PROVIDERS, "default")
STOCK = ("frozen", "peft", "peft_bf16", "compile", *peers.STYLES)


def implement(model: nn.Module, setting: Setting, implementation: str) -> nn.Module:
    """The stock model as `implementation` trains it; changed in place.

    frozen: nothing is trained, the backward goes to the input embeddings. peft: HF PEFT, float32 adapters; peft_bf16:
    adapters in the model's dtype; compile: that, every decoder layer by torch.compile. unsloth_style, lorafusion_style:
    `peers`, everything but the linear layers stock. torch, triton, default: fused, by provider.
    """
    family, method = FAMILIES[setting.family], LoRA(r=setting.r, alpha=_SCALING * setting.r, dropout=setting.dropout)
    dtype = next(model.parameters()).dtype
    if implementation == "frozen":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_())
        return model.train()
    if implementation in peers.STYLES:
        model.requires_grad_(False)
        dropout = 0.0 if implementation == "unsloth_style" else setting.dropout
        for layer in family.layers_of(model):
            for module in [module for module in layer.modules() if type(module) is nn.Linear]:
                peers.PeerLinear.convert(module, implementation, r=setting.r, scaling=_SCALING, dropout=dropout)
        return model.train()
    if implementation in ("peft", "peft_bf16", "compile"):
        model, _ = add_baseline(model, method)
        if implementation != "peft":
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
        if implementation == "compile":
            for layer in family.layers_of(base_model(model)):
                layer.compile()
        return model.train()
    return fuse(add_peft(model, method)).train()


def step(model: nn.Module, inputs: dict, implementation: str) -> Callable[[], Tensor]:
    """One training step: forward, backward, and AdamW where something is trained; gives the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = inputs["input_ids"].device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=on_gpu) if trained else None
    inputs = {**inputs, "use_cache": False}
    if implementation in FUSED:
        # Known on the host, as the package's collator knows it: the step need not wait for the GPU.
        inputs["supervised_capacity"] = int((inputs["labels"][:, 1:] != -100).sum(1).max())

    def one() -> Tensor:
        with on_provider(implementation):
            loss = model(**inputs).loss
            loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return one
