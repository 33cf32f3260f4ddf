"""The papers' experiments as recipes: one function each, which takes a scale, and one line in `RECIPES`."""

from collections.abc import Callable

from mmpeft_fast.study.recipes.empirical import (
    connector,
    data_scale,
    generalisation,
    hallucination,
    location,
    methods,
    size,
    stability,
)
from mmpeft_fast.study.recipes.layernorm import layernorm
from mmpeft_fast.study.recipes.recipe import Data, Published, Recipe, RecipeCell
from mmpeft_fast.study.recipes.scale import FULL, SCALES, SMALL, Scale
from mmpeft_fast.study.recipes.throughput import throughput

__all__ = ["FULL", "RECIPES", "SCALES", "SMALL", "Data", "Published", "Recipe", "RecipeCell", "Scale", "make_recipe"]

RECIPES: dict[str, Callable[[Scale], Recipe]] = {
    "methods": methods,
    "connector": connector,
    "location": location,
    "size": size,
    "data-scale": data_scale,
    "stability": stability,
    "generalisation": generalisation,
    "hallucination": hallucination,
    "layernorm": layernorm,
    "throughput": throughput,
}


def make_recipe(name: str, scale: Scale = FULL) -> Recipe:
    """The recipe of that name. Raises ValueError where there is none."""
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name](scale)
