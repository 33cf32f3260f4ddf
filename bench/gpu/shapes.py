"""The sizes that are tuned and timed: the four linear calls of a decoder layer of LLaMA-7B and of Qwen2.5-7B."""

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
TOKENS = (4096, 1024, 8192)
RANKS = (16, 128, 64)


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
