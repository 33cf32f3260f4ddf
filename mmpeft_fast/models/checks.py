"""Whether a configuration can be a model at all: transformers checks the types of its values, not what they mean."""

from collections.abc import Iterator
from typing import Annotated, Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmpeft_fast.fields import above, at_least, below, between, check_value, one_of

_Size = Annotated[int, between(1, 2**24)]
_Depth = Annotated[int, between(1, 512)]  # layers; a typo is not an hour of building
_Share = Annotated[float, at_least(0), below(1)]
_Positive = Annotated[float, above(0)]
_Activation = Annotated[str, one_of(*ACT2FN)]
# "default" and "axial" are computed by the models themselves; "mrope" is an older name of the first.
_Rope = Annotated[str, one_of("default", "axial", "mrope", *ROPE_INIT_FUNCTIONS)]
_SIZES = (
    *("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "kv_channels", "seq_length", "image_size", "patch_size", "num_channels"),
    *("in_channels", "embed_dim", "num_heads", "out_hidden_size", "spatial_merge_size", "temporal_patch_size"),
    *("window_size", "num_position_embeddings", "sliding_window", "image_seq_length", "width", "heads", "output_dim"),
    *("num_queries", "projection_dim"),
)
_EXPECTED = dict.fromkeys(_SIZES, _Size) | {
    **dict.fromkeys(("num_hidden_layers", "depth", "layers"), _Depth),
    **dict.fromkeys(("hidden_act", "projector_hidden_act"), _Activation),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "mlp_ratio", "rotary_emb_base"), _Positive
    ),
    **dict.fromkeys(("attention_dropout", "attn_dropout_prob", "emb_dropout_prob"), _Share),
    "tokens_per_second": _Positive,
}
_SIDES = ("image_size", "patch_size")
_MAY_BE_NONE = {"head_dim", "num_key_value_heads", "sliding_window", "intermediate_size", "projection_dim"}


def check_config(config: PretrainedConfig) -> None:
    """Raises ValueError for sizes below one, heads that do not divide, and activations or rotations nobody knows, in a
    configuration or one inside it."""
    for where, part in _parts(config, ""):
        for name, hint in _EXPECTED.items():
            value = getattr(part, name, None)
            if hasattr(part, name) and not (value is None and name in _MAY_BE_NONE):
                for each in _sides(value) if name in _SIDES else (value,):
                    check_value(f"{where}{name}", each, hint)
        _check_heads(part, where)
        _check_feature_layers(part, where)
        rope = getattr(part, "rope_parameters", None)
        if rope is not None:
            check_value(f"{where}rope_parameters", rope, dict)
            _check_rope(rope, f"{where}rope_parameters.")


def _parts(config: PretrainedConfig, where: str) -> Iterator[tuple[str, PretrainedConfig]]:
    yield where, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value, f"{where}{name}.")


def _check_heads(part: PretrainedConfig, where: str) -> None:
    for width, heads in (("hidden_size", "num_attention_heads"), ("embed_dim", "num_heads"), ("width", "heads")):
        size, number = getattr(part, width, None), getattr(part, heads, None)
        if size and number and not getattr(part, "head_dim", None) and size % number:
            raise ValueError(f"{where}{width}: expected a multiple of the {number} heads, got {size}")
    heads, kv_heads = getattr(part, "num_attention_heads", None), getattr(part, "num_key_value_heads", None)
    if heads and kv_heads and heads % kv_heads:
        raise ValueError(f"{where}num_key_value_heads: expected a divisor of the {heads} heads, got {kv_heads}")
    side, patch = getattr(part, "image_size", None), getattr(part, "patch_size", None)
    if side and patch and any(each > most for each, most in zip(_sides(patch), _sides(side), strict=True)):
        raise ValueError(f"{where}patch_size: expected at most the image_size {side}, got {patch}")


def _sides(value: Any) -> tuple[Any, Any]:
    """Height and width of a value that gives both, or one for both."""
    pair = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    return pair[0], pair[1]


def _check_feature_layers(part: PretrainedConfig, where: str) -> None:
    """The hidden states of the vision tower that a connector reads: its layers' and, first, its embeddings'."""
    chosen = getattr(part, "vision_feature_layer", None)
    number = getattr(getattr(part, "vision_config", None), "num_hidden_layers", None)
    if chosen is None or number is None:
        return
    for layer in chosen if isinstance(chosen, list | tuple) else [chosen]:
        check_value(f"{where}vision_feature_layer", layer, Annotated[int, between(-number - 1, number)])


def _check_rope(rope: dict[str, Any], where: str) -> None:
    """One rotation's parameters, or several by the kind of layer."""
    for name, value in rope.items():
        if isinstance(value, dict):
            _check_rope(value, f"{where}{name}.")
    if "rope_type" in rope:
        check_value(f"{where}rope_type", rope["rope_type"], _Rope)
    for name in ("rope_theta", "factor"):
        if rope.get(name) is not None:
            check_value(f"{where}{name}", rope[name], _Positive)
