"""Time and memory over batch, length, questions an image, method, implementation and the base's format."""

from mmpeft_fast.study.recipes.recipe import Published, Recipe, RecipeCell
from mmpeft_fast.study.recipes.scale import STUDY_METHODS, Scale

_SOURCE = "Qwen-VL's published profile of LoRA: one A100-80, batch 1, 8 accumulated"
# Tokens a sample: GB and seconds a step.
_PROFILE = {384: ("23.3", "2.2"), 512: ("23.6", "2.3"), 1024: ("25.1", "3.5"), 2048: ("27.3", "5.9")}


def throughput(scale: Scale) -> Recipe:
    """One axis varies at a time; the rest is LoRA, fused, in the usual batch."""

    def cell(axis: str, value: object, *, model: str = scale.model, method: str = "lora", **fields) -> RecipeCell:
        batch = fields.pop("batch_size", scale.batch)
        training = {"batch_size": batch, "global_batch_size": fields.pop("global_batch_size", batch)}
        return scale.cell(
            model,
            method,
            labels={"model": model, "axis": axis, "value": str(value)},
            data=scale.many_questions,
            training={"max_steps": scale.steps, **training},
            **fields,
        )

    cells = [cell("batch", batch, batch_size=batch) for batch in scale.batches]
    cells += [
        cell("length", length, model=scale.profile_model, length=length, batch_size=1, global_batch_size=8)
        for length in scale.lengths
    ]
    cells += [cell("questions an image", number, questions_per_image=number) for number in (1, scale.batch)]
    cells += [cell("method", method, method=method) for method in (*STUDY_METHODS, "layernorm", "layernorm-simp")]
    cells += [cell("implementation", each, implementation=each) for each in ("peft", "fused")]
    cells += [cell("base format", dtype, dtype=dtype) for dtype in scale.dtypes]
    return Recipe(
        name="throughput",
        title="time and memory of a step",
        source=_SOURCE,
        rows=("model", "axis", "value"),
        cells=tuple(cells),
        published=tuple(
            Published(
                labels={"model": "qwen-vl-chat", "axis": "length", "value": str(length)},
                quantity=quantity,
                measure=measure,
                value=value,
                source=_SOURCE,
            )
            for length, values in _PROFILE.items()
            for (quantity, measure), value in zip((("memory, GB", "peak_gb"), ("seconds a step", "step_s")), values)
        ),
        notes=("the first paper has no numbers of memory or time",),
    )
