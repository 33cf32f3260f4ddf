"""The linear calls of a decoder layer of LLaMA-7B and of Qwen2.5-7B, and the settings of whole steps."""

from dataclasses import dataclass
from typing import NamedTuple


class Dims(NamedTuple):
    """hidden and intermediate size, heads of queries and of keys and values, all of `head_dim`."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    has_bias: bool
    head_dim: int = 128


DIMS = {
    "llama-7b": Dims(4096, 11008, 32, 32, 32064, has_bias=False),
    "qwen2.5-7b": Dims(3584, 18944, 28, 4, 152064, has_bias=True),
    "tiny": Dims(16, 24, 2, 1, 40, has_bias=True, head_dim=8),
}


class LinearCall(NamedTuple):
    """prologue of the input [M, width]; output widths of the segments; bias and residual."""

    prologue: str
    width: int
    num_outs: tuple[int, ...]
    bias: bool = False
    residual: bool = False


def linear_calls(dims: Dims) -> dict[str, LinearCall]:
    """The calls of a decoder layer in their order."""
    q, kv = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    return {
        "qkv": LinearCall("rms_norm", dims.hidden, (q, kv, kv), bias=dims.has_bias),
        "o": LinearCall("none", q, (dims.hidden,), residual=True),
        "gate_up": LinearCall("rms_norm", dims.hidden, (dims.intermediate, dims.intermediate)),
        "down": LinearCall("swiglu", dims.intermediate, (dims.hidden,), residual=True),
    }


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, its batch and LoRA on it; `num_layers` is the model's own where None.

    dims: of `DIMS`, for single calls. size: of `Family.sizes`, or "tiny". Every sample has one image of
    `num_image_tokens` (0: none); its last `supervised` share carries labels.
    """

    name: str
    dims: str
    family: str
    size: str
    batch_size: int
    length: int
    num_image_tokens: int
    supervised: float
    r: int
    dropout: float
    num_layers: int | None = None

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length


_LLAVA = {
    "dims": "llama-7b", "family": "llava", "size": "llava-1.5-7b", "batch_size": 4, "length": 700,
    "num_image_tokens": 576, "supervised": 0.05, "r": 128, "dropout": 0.05,
}  # fmt: skip
_QWEN = {
    "dims": "qwen2.5-7b", "family": "qwen2_5_vl", "size": "qwen2.5-vl-7b", "batch_size": 2, "length": 4096,
    "num_image_tokens": 0, "supervised": 1.0, "r": 16, "dropout": 0.0,
}  # fmt: skip
_LLAMA = {**_LLAVA, "family": "llama", "size": "llama-2-7b", "num_image_tokens": 0, "dropout": 0.0}
_TINY = {"dims": "tiny", "size": "tiny", "batch_size": 2, "supervised": 0.1, "r": 3, "dropout": 0.05, "num_layers": 2}
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(name="llava-1.5-7b lora r128 4x700", **_LLAVA),
        Setting(name="qwen2.5-vl-7b lora r16 2x4096 text", **_QWEN),
        Setting(name="llava-1.5-7b lora r128 4x700, 8 layers", **_LLAVA, num_layers=8),
        Setting(name="qwen2.5-vl-7b lora r16 2x4096 text, 8 layers", **_QWEN, num_layers=8),
        Setting(name="llama-2-7b lora r128 4x700 text", **_LLAMA),
        Setting(name="qwen2-7b lora r16 2x4096 text", **{**_QWEN, "family": "qwen2", "size": "qwen2-7b"}),
        Setting(name="tiny llama text", family="llama", length=40, num_image_tokens=0, **_TINY),
        Setting(name="tiny llava", family="llava", length=90, num_image_tokens=64, **_TINY),
        Setting(name="tiny qwen2_5_vl", family="qwen2_5_vl", length=90, num_image_tokens=16, **_TINY),
    )
}


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What a run is about: everything on a GPU, or the same on a CPU with tiny models in float32 (Triton's interpreter
    has no right bf16).

    whole, short, text: settings of whole models, of those with few layers, and of text decoders. problems: (dims, r, M,
    dropout) of single calls, the first two of which are those of the whole models. fused: the provider of whole steps.
    few: items of each kind of check, all where None.
    """

    device: str
    dtype: str
    whole: tuple[str, ...]
    short: tuple[str, ...]
    text: tuple[str, ...]
    problems: tuple[tuple[str, int, int, float], ...]
    fused: str = "triton"
    few: int | None = None


GPU = Scope(
    device="cuda", dtype="bf16", whole=tuple(SETTINGS)[:2], short=tuple(SETTINGS)[2:4],
    text=tuple(SETTINGS)[4:6],
    problems=(
        ("llama-7b", 128, 2800, 0.05), ("qwen2.5-7b", 16, 8192, 0.0), ("llama-7b", 16, 4096, 0.05),
        ("qwen2.5-7b", 64, 2048, 0.05),
    ),
)  # fmt: skip
DRY = Scope(
    device="cpu",
    dtype="fp32",
    whole=("tiny llava",),
    short=("tiny qwen2_5_vl",),
    text=("tiny llama text",),
    fused="torch",
    problems=(("tiny", 3, 20, 0.05),),
    few=1,
)
