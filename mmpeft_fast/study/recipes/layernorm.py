"""The table of "Tuning LayerNorm in Attention" (arXiv 2312.11420)."""

from mmpeft_fast.placement import PARTS
from mmpeft_fast.plan.papers import HEADLINE, LAYERNORM_GB, LAYERNORM_PERCENT
from mmpeft_fast.study.recipes.recipe import Published, Recipe
from mmpeft_fast.study.recipes.scale import FULL, Scale

PAPER = "arXiv 2312.11420"
# The paper's names of what can be run here, ours, and the further parts that are trained.
_METHODS = {"LoRA": ("lora", PARTS), "LayerNorm": ("layernorm", ()), "LayerNorm-simp": ("layernorm-simp", ())}


def layernorm(scale: Scale) -> Recipe:
    """LoRA and LayerNorm with connector, embeddings and head, and the norms alone; on dialogues and on all data."""
    sizes = (FULL.model, FULL.large_model)
    return Recipe(
        name="layernorm",
        title="LayerNorm against LoRA; dialogues alone against all data",
        source=PAPER,
        rows=("model", "method", "data"),
        cells=tuple(
            scale.cell(
                model,
                method,
                labels={"model": model, "method": name, "data": word},
                settings={"r": scale.layernorm_rank, "alpha": 2 * scale.layernorm_rank} if method == "lora" else {},
                train=parts,
                data=data,
                evaluations=scale.layernorm_tests,
            )
            for model in (scale.model, scale.large_model)
            for name, (method, parts) in _METHODS.items()
            for word, data in (("dialogues", scale.dialogues), ("all", scale.everything))
        ),
        published=tuple(
            Published(
                labels={"model": model, "method": name},
                quantity=quantity,
                measure=measure,
                value=str(values[name][index]),
                source=source,
            )
            for quantity, measure, values, source in (
                ("trained parameters, %", "trained_percent", LAYERNORM_PERCENT, f"{PAPER}, table 1; LoRA of rank 64"),
                ("memory of one A100, GB", "peak_gb", LAYERNORM_GB, f"{PAPER}, table 1"),
            )
            for name in _METHODS
            for index, model in enumerate(sizes)
        )
        + tuple(
            Published(
                labels={"model": FULL.large_model, "method": "LayerNorm"},
                quantity=f"less {what} than LoRA, %",
                measure=f"less_{what}",
                value=str(value),
                source=f"{PAPER}, abstract",
            )
            for what, value in HEADLINE.items()
        ),
        notes=(
            "the paper's full fine-tuning and its tuning of q and v as they are have no method here",
            "the paper's learning rates are not known here; ours are each method's own",
        ),
    )
