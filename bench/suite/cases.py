"""What the suite measures: decoders of real models' dimensions under a method, and which of them say most.

A *step* is a decoder with head and loss, a *layer* the same decoder without them, its input's gradient wanted. Decoders
are LLaMA's or, with biases on q, k and v, Qwen2's, with fewer layers than the model has. An *op* is the registry's.
"""

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mmpeft_fast import METHODS, Method, make_method
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.models import FAMILIES

LAYER, STEP = "layer", "step"
# Published sizes of this package's families; of InternVL3 (Zhu et al. 2025, table 1) the Qwen2.5 decoders.
_FAMILY = {
    "llava-1.5-7b": "llava", "llava-1.5-13b": "llava", "qwen-vl-chat": "qwen_vl", "qwen2.5-vl-3b": "qwen2_5_vl",
    "qwen2.5-vl-7b": "qwen2_5_vl", "qwen2.5-vl-72b": "qwen2_5_vl",
}  # fmt: skip
_INTERNVL3 = {
    "internvl3-1b": (896, 4864, 14, 2, 151674), "internvl3-2b": (1536, 8960, 12, 2, 151674),
    "internvl3-8b": (3584, 18944, 28, 4, 151674),
}  # fmt: skip
MODELS = (*_FAMILY, *_INTERNVL3)
RANKED = {"lora": "r", "adapter": "bottleneck", "prefix": "num_virtual_tokens"}  # method -> its size's name
_RANKS = {"lora": (16, 128), "adapter": (64, 256), "prefix": (20,)}
# op of the registry -> the method that it is for, any for a loss
_OP_METHOD = {
    "lora_linear": "lora", "norm_lora_gate_up": "lora", "swiglu_lora_down": "lora", "swiglu_ia3_down": "ia3",
    "swiglu_adapter_down": "adapter", "prefix_attention": "prefix", "norm": "layernorm", "loss": "lora",
}  # fmt: skip
KINDS = ("step", "layer", "op")
# A head over all of Qwen's words would hide the decoder of few layers.
_MOST_VOCAB = 32064
_SMALL_VOCAB = 32  # of a layer's model, whose head does not run
_HEAD_DIMS = (32, 64, 80, 128)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One subject. rank: of LoRA; an Adapter's bottleneck, a prefix's tokens, 0 where a method has no such size.
    supervised: share of the tokens that carry a label, in a step."""

    what: str = STEP
    model: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    has_bias: bool
    vocab: int
    layers: int = 1
    method: str = "lora"
    rank: int = 16
    dropout: float = 0.0
    batch_size: int = 1
    seq_len: int = 512
    supervised: float = 0.05
    dtype: str = "fp32"

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def is_op(self) -> bool:
        return self.what not in (STEP, LAYER)

    @property
    def parameters(self) -> int:
        """Of the frozen linear layers."""
        if self.is_op:
            return self._op_weights()
        kv_width = self.hidden // self.heads * self.kv_heads
        layer = 2 * self.hidden * (self.hidden + kv_width) + 3 * self.hidden * self.intermediate
        return self.layers * layer + (self.hidden * self.vocab if self.what == STEP else 0)

    def _op_weights(self) -> int:
        wide = self.hidden * self.intermediate
        sizes = {"lora_linear": self.hidden**2, "norm_lora_gate_up": 2 * wide, "loss": self.hidden * self.vocab}
        return sizes.get(self.what, wide if self.what.startswith("swiglu") else 0)

    @property
    def flops(self) -> int:
        """Of the frozen model's forward pass and the gradient of its input, causal attention as half of its square."""
        if self.is_op and self.what != "prefix_attention":
            return 4 * self.parameters * self.tokens
        attention = 7 * self.layers * self.batch_size * self.seq_len**2 * self.hidden
        return 4 * self.parameters * self.tokens + attention

    def name(self) -> str:
        size = f" r{self.rank}" if self.rank else ""
        layers = f"{self.layers} layer{'s' * (self.layers != 1)}"
        what = {STEP: f"step of {layers}", LAYER: layers}.get(self.what, self.what)
        return f"{self.model} {what} {self.method}{size} {self.batch_size}x{self.seq_len} {self.dtype}"

    def made_method(self) -> Method:
        options = {RANKED[self.method]: self.rank} if self.method in RANKED else {}
        if self.method == "lora":
            options["alpha"] = 2 * self.rank
        if self.method in ("lora", "adapter"):
            options["dropout"] = self.dropout
        return make_method(self.method, **options)


def dimensions(model: str) -> dict[str, int | bool]:
    """Dimensions of a real model's decoder as fields of a `Case`."""
    if model in _INTERNVL3:
        hidden, intermediate, heads, kv_heads, vocab = _INTERNVL3[model]
        has_bias = True
    else:
        config = FAMILIES[_FAMILY[model]].sizes[model]().get_text_config()
        hidden, heads, vocab = config.hidden_size, config.num_attention_heads, config.vocab_size
        kv_heads = getattr(config, "num_key_value_heads", heads)
        # Qwen-VL-Chat counts gate and up together.
        intermediate = config.intermediate_size // (2 if model == "qwen-vl-chat" else 1)
        has_bias = model.startswith("qwen")
    return {
        "hidden": hidden, "intermediate": intermediate, "heads": heads, "kv_heads": kv_heads, "has_bias": has_bias,
        "vocab": min(vocab, _MOST_VOCAB),
    }  # fmt: skip


def suite_cases(
    device: str, kinds: Sequence[str], models: Sequence[str], methods: Sequence[str], dtypes: Sequence[str]
) -> list[Case]:
    """Every combination that the suite knows, those that say most first: `ordered`."""
    on_gpu = device == "cuda"
    lengths = ((1, 1024), (4, 700), (2, 4096)) if on_gpu else ((1, 32), (1, 128), (2, 512))
    subjects = [(what, method) for what, method in itertools.product((STEP, LAYER), methods) if what in kinds]
    if "op" in kinds:
        subjects += [(op, method) for op, method in _OP_METHOD.items() if method in methods]
    found = []
    for (what, method), model, dtype in itertools.product(subjects, models, dtypes):
        if (what, method) == (LAYER, "prefix"):
            continue  # HF PEFT's prefix is the whole model's
        layers = (8 if on_gpu else 2) if what == STEP else 1
        common = {"what": what, "model": model, "layers": layers, "method": method, "dtype": dtype}
        ranks = (0,) if what in ("norm", "loss") else _RANKS.get(method, (0,))
        for rank, (batch_size, seq_len) in itertools.product(ranks, lengths):
            sizes = {"rank": rank, "batch_size": batch_size, "seq_len": seq_len}
            if what == LAYER:
                sizes["vocab"] = _SMALL_VOCAB
            found.append(Case(**common, **dimensions(model) | sizes))
    return list(ordered(found))


def _features(case: Case) -> dict[str, object]:
    found = {
        "what": case.what, "model": case.model, "method": case.method, "tokens": case.tokens, "dtype": case.dtype
    }  # fmt: skip
    return found | ({"rank": (case.method, case.rank)} if case.rank else {})


def features(case: Case) -> set[tuple]:
    """What a case is the first to show where nothing before it had it: single settings, and pairs of them."""
    singles = sorted(_features(case).items())
    return {*singles, *itertools.combinations(singles, 2)}


def ordered(cases: Iterable[Case]) -> Iterator[Case]:
    """Cases so that every beginning shows as much as it can: next is always the one with the most settings that are
    new, then the most pairs of settings, then the cheapest."""
    left = {case: features(case) for case in sorted(cases, key=lambda case: case.flops)}
    while left:
        chosen = max(left, key=lambda case: _news(left[case]))
        shown = left.pop(chosen)
        yield chosen
        for remaining in left.values():
            remaining -= shown


def _news(new: set[tuple]) -> tuple[int, int]:
    singles = sum(not isinstance(feature[0], tuple) for feature in new)
    return singles, len(new) - singles


def growth_cases(base: Case, axis: str, device: str) -> list[Case]:
    """`base` along one axis: every other size, then those between, so that little time shows much of it."""
    on_gpu = device == "cuda"
    values = {
        "tokens": [128 * 2**i for i in range(9 if on_gpu else 5)],
        "rank": [4 * 2**i for i in range(8)],
        "layers": [1, 2, 4, 8, 16] if on_gpu else [1, 2, 4, 8],
    }[axis]
    field = "seq_len" if axis == "tokens" else axis
    return [replace(base, **{field: value}) for value in (*values[::2], *values[1::2])]


def random_case(seed: int, index: int, dtype: str) -> Case:
    """The shape number `index` of the sweep `seed`: hidden 64 to 4096, tokens 1 to 4096, ranks 1 to 512, grouped heads,
    every method; sizes are uniform in their logarithm."""
    draw = random.Random(f"{seed}/{index}")

    def size(low: int, high: int) -> int:
        return round(math.exp(draw.uniform(math.log(low), math.log(high))))

    head_dim = draw.choice(_HEAD_DIMS)
    kv_heads = size(1, 8)
    heads = kv_heads * draw.choice((1, 1, 2, 4, 7))
    heads = max(1, min(heads, size(64, 4096) // head_dim))
    kv_heads = math.gcd(heads, kv_heads)
    hidden = max(64, heads * head_dim)
    heads = hidden // head_dim
    kv_heads = math.gcd(heads, kv_heads)
    method = draw.choice(sorted(METHODS))
    tokens = size(1, 4096)
    batch_size = draw.choice([count for count in (1, 2, 3, 4) if tokens // count])
    what = STEP if method == "prefix" else draw.choice((STEP, LAYER))
    seq_len = max(tokens // batch_size, 2 if what == STEP else 1)  # a single token has no successor to predict
    return Case(
        what=what, model=f"random {seed}/{index}", hidden=hidden, intermediate=size(hidden, 4 * hidden), heads=heads,
        kv_heads=kv_heads, has_bias=draw.random() < 0.5, vocab=size(64, 4096), method=method,
        rank=size(1, 512) if method in RANKED else 0, dropout=draw.choice((0.0, 0.05)), batch_size=batch_size,
        seq_len=seq_len, supervised=draw.choice((0.05, 0.5, 1.0)), dtype=dtype,
    )  # fmt: skip


def stock(case: Case, device: str) -> nn.Module:
    """The model without a method, random weights from seed 0."""
    options = {
        "hidden_size": case.hidden, "intermediate_size": case.intermediate, "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads, "vocab_size": case.vocab,
        "max_position_embeddings": 65536, "attn_implementation": "sdpa", "tie_word_embeddings": False,
    }  # fmt: skip
    kind, config = (Qwen2ForCausalLM, Qwen2Config) if case.has_bias else (LlamaForCausalLM, LlamaConfig)
    torch.manual_seed(0)
    with torch.device(device):
        return kind(config(**options)).to(DTYPES[case.dtype])


def batch(case: Case, device: str) -> dict[str, Tensor]:
    """Of a step random tokens [B, T], labels at the end of every sample; of a layer random hidden states [B, T, H]."""
    generator = torch.Generator().manual_seed(0)
    size = (case.batch_size, case.seq_len)
    if case.what == LAYER:
        embeddings = torch.randn(*size, case.hidden, generator=generator) * 0.02
        return {"inputs_embeds": embeddings.to(device, DTYPES[case.dtype])}
    ids, labels = (torch.randint(0, case.vocab, size, generator=generator) for _ in range(2))
    labels[:, : case.seq_len - max(1, round(case.seq_len * case.supervised))] = IGNORE_INDEX
    return {"input_ids": ids.to(device), "labels": labels.to(device)}
