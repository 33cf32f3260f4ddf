"""The papers' trainable parameters and memory, counted on the real models, beside what was published.

"An Empirical Study on PEFT for MultiModal LLMs" (arXiv 2406.05130, table 15) and "Tuning LayerNorm in Attention"
(arXiv 2312.11420, table 1).
"""

from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig

from mmpeft_fast.methods import make_method
from mmpeft_fast.models import empty_model, family_of
from mmpeft_fast.peft_model import add_peft, study_method
from mmpeft_fast.plan.request import Request, model_config
from mmpeft_fast.plan.step import count_step

SIZES = ("llava-1.5-7b", "llava-1.5-13b")
_VOCABULARY = 32000  # of the papers' checkpoints; transformers' have 64 more rows
# Percent of all parameters, connector frozen and tuned. Of Qwen-VL-Chat we have no published percent at hand.
STUDY_PERCENT = {
    "llava-1.5-7b": {
        "adapter": ("2.771", "3.060"), "lora": ("4.332", "4.616"), "ia3": ("0.0087", "0.306"),
        "prefix": ("0.074", "0.371"),
    },
    "llava-1.5-13b": {
        "adapter": ("2.301", "2.532"), "lora": ("3.615", "3.842"), "ia3": ("0.0072", "0.243"),
        "prefix": ("0.061", "0.297"),
    },
}  # fmt: skip
# Percent at 7B and 13B. All but LayerNorm-simp train connector, embeddings and head too; LoRA of rank 64.
LAYERNORM_PERCENT = {
    "LoRA": ("5.92", "4.30"),
    "attention q, v": ("19.02", "18.24"),
    "LayerNorm": ("3.78", "2.50"),
    "LayerNorm-simp": ("0.004", "0.003"),
}
LAYERNORM_GB = {"LoRA": (29.4, 45.0), "LayerNorm": (24.2, 37.1), "LayerNorm-simp": (18.9, 31.7)}
HEADLINE = {"parameters": 41.9, "memory": 17.6}  # percent less than LoRA at 13B
_LORA_RANK = 64
_PARTS = ("connector", "embeddings", "head")
MEMORY_REQUEST = {"model": "llava-1.5-13b", "batch_size": 1, "seq_len": 1024, "checkpointing": True}
MEMORY_ASSUMPTIONS = (
    "theirs: one A100-80; batch size, length and the optimizer's precision are not published. LayerNorm takes 5.4 GB "
    "more than LayerNorm-simp for 333 M more trained parameters: 16 bytes each, as with float32 master weights",
    "ours: batch size 1, 1024 tokens with one image, 5 % supervised, activation checkpointing, bf16 weights, AdamW "
    "with states in the parameters' dtype, float32 for LoRA's; transformers' two-layer connector",
)


class Row(NamedTuple):
    """A method's trained parameters, ours in percent of all, and the published percent."""

    size: str
    method: str
    trained: int
    percent: float
    published: str | None


def _percent(model: nn.Module) -> tuple[int, float]:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, 100 * trained / sum(parameter.numel() for parameter in model.parameters())


def _paper_config(size: str) -> PretrainedConfig:
    config = model_config(size)
    if hasattr(config, "text_config"):
        config.text_config.vocab_size = _VOCABULARY
    return config


def study_rows() -> list[Row]:
    """The study's methods at every size, connector frozen and tuned."""
    rows = []
    for size in (*SIZES, "qwen-vl-chat"):
        for method in ("adapter", "lora", "ia3", "prefix"):
            published = STUDY_PERCENT.get(size, {}).get(method, (None, None))
            model = empty_model(_paper_config(size))
            add_peft(model, study_method(model, method))
            rows.append(Row(size, method, *_percent(model), published[0]))
            family = family_of(model)
            for module in family.modules_at(model, family.connector):
                module.requires_grad_(True)
            rows.append(Row(size, f"{method} + connector", *_percent(model), published[1]))
    return rows


def _layernorm_model(size: str, method: str) -> nn.Module:
    """The paper's model has a linear connector."""
    model = empty_model(_paper_config(size))
    config = model.config
    model.model.multi_modal_projector = nn.Linear(
        config.vision_config.hidden_size, config.text_config.hidden_size, device="meta"
    )
    if method in ("LayerNorm", "LayerNorm-simp"):
        return add_peft(model, make_method(method.lower()))
    if method == "LoRA":
        add_peft(model, make_method("lora", r=_LORA_RANK), train_connector=True)
    else:
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        for layer in family_of(model).layers_of(model):
            layer.self_attn.q_proj.requires_grad_(True)
            layer.self_attn.v_proj.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)
    return model


def layernorm_rows() -> list[Row]:
    """The methods of "Tuning LayerNorm in Attention" at both sizes."""
    return [
        Row(size, method, *_percent(_layernorm_model(size, method)), published[i])
        for i, size in enumerate(SIZES)
        for method, published in LAYERNORM_PERCENT.items()
    ]


def memory_peaks(implementation: str) -> dict[str, int]:
    """Peak bytes of LoRA's and of LayerNorm's step at 13B under MEMORY_ASSUMPTIONS, by name of the paper."""
    common = {**MEMORY_REQUEST, "implementation": implementation}
    requests = {
        "LoRA": Request(method="lora", settings={"r": _LORA_RANK}, train=_PARTS, **common),
        "LayerNorm": Request(method="layernorm", **common),
        "LayerNorm-simp": Request(method="layernorm-simp", **common),
    }
    return {name: count_step(request, "cuda").peak_bytes for name, request in requests.items()}


def papers_text() -> str:
    """Every table, ours beside the published numbers."""
    from mmpeft_fast.plan.report import table

    def cells(row: Row) -> list[str]:
        digits = 3 if row.published is None else len(row.published.split(".")[1])
        published = "–" if row.published is None else f"{row.published} %"
        return [f"{row.size} {row.method}", f"{row.trained:,}", f"{row.percent:.{digits}f} %", published]

    header = ("trained parameters", "number", "ours", "published")
    lines = ["An Empirical Study on PEFT for MultiModal LLMs (arXiv 2406.05130), table 15", ""]
    lines += table(header, list(map(cells, study_rows())))
    lines += ["", "Tuning LayerNorm in Attention (arXiv 2312.11420), table 1; LoRA of rank 64", ""]
    rows = layernorm_rows()
    lines += table(header, list(map(cells, rows)))
    percent = {row.method: row.percent for row in rows if row.size == SIZES[1]}
    fewer = 100 * (1 - percent["LayerNorm"] / percent["LoRA"])
    lines += ["", "LayerNorm against LoRA at 13B", ""]
    comparison = [
        ["smaller share of trained parameters, %", f"{fewer:.1f}", f"{HEADLINE['parameters']}"],
    ]
    for implementation in ("peft", "fused"):
        peaks = memory_peaks(implementation)
        for name, peak in peaks.items():
            comparison.append([f"{name}, {implementation}: peak GB", f"{peak / 1e9:.1f}", f"{LAYERNORM_GB[name][1]}"])
        less = 100 * (1 - peaks["LayerNorm"] / peaks["LoRA"])
        comparison.append([f"less memory, {implementation}, %", f"{less:.1f}", f"{HEADLINE['memory']}"])
    lines += table(("", "ours", "published"), comparison)
    lines += ["", "assumed", *(f"  {line}" for line in MEMORY_ASSUMPTIONS)]
    return "\n".join(lines)
