"""What the study varies beyond methods and implementations, and the settings behind a value, which the papers' recipes
share."""

LOCATIONS = ("attention", "mlp", "both")
SEEDS = (21, 42, 63)
LOCATED = ("adapter", "lora", "ia3")  # methods whose modules have a choice of places
SIZES = {"lora": ("r", (2, 4)), "adapter": ("bottleneck", (2, 4)), "prefix": ("num_virtual_tokens", (5, 40))}
SAMPLES = (12, 48)

# Each axis of the study, and its values as cells and `--axes AXIS=VALUE,...` name them.
AXES: dict[str, tuple[str, ...]] = {
    "task": ("unseen", "seen"),
    "location": LOCATIONS,
    "size": tuple(f"{setting}={value}" for setting, values in SIZES.values() for value in values),
    "connector": ("tuned",),
    "samples": tuple(map(str, SAMPLES)),
    "seed": tuple(map(str, SEEDS)),
}


def located(place: str) -> dict[str, str]:
    """A method's settings for modules at one of `LOCATIONS`."""
    return {"targets": place}


def sized(method: str, setting: str, value: int) -> dict[str, int]:
    """A method's settings at a size; LoRA's alpha is twice its rank, as in the paper."""
    return {setting: value} | ({"alpha": 2 * value} if method == "lora" else {})


def chosen_axes(words: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The values to run of each axis, from words `AXIS` (all of them) or `AXIS=VALUE,VALUE`.

    Raises ValueError for an unknown or repeated axis, and an unknown value.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    for word in words:
        axis, has_values, values = word.partition("=")
        if axis not in AXES:
            raise ValueError(f"axis: expected one of {', '.join(AXES)}, got {axis!r}")
        if axis in chosen:
            raise ValueError(f"axis: expected each name once, got {', '.join(words)}")
        chosen[axis] = tuple(values.split(",")) if has_values else AXES[axis]
        for value in chosen[axis]:
            if value not in AXES[axis]:
                raise ValueError(f"axis {axis}: expected values of {', '.join(AXES[axis])}, got {value!r}")
    return chosen
