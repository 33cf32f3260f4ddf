"""What the package has to know of a model family: where its parts are, and how to build it small and at real sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

# Roles of a LLaMA-shaped decoder layer, relative to the layer.
LLAMA_LAYER_ROLES: Mapping[str, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family of transformers. All paths are dotted names below the model; `*` stands for list entries.

    Attributes:
        name: key in `FAMILIES`.
        model_class: the `...ForConditionalGeneration` class.
        processor_class: what turns text and images into its inputs, loaded with a checkpoint.
        model_types: `config.model_type` values that belong to the family.
        decoder: path of the text model (with `layers`, `norm`, `embed_tokens`, `rotary_emb`).
        connector: paths of the modules between vision tower and decoder.
        vision_tower: paths of the modules that run without a graph while frozen.
        sizes: real configurations by name, each a function without arguments.
        tiny_config: (vocabulary size, id of a token by its text) -> configuration of a few million parameters.
        tiny_processor: tokenizer -> processor.
        special_tokens: tokens a tokenizer for this family must know.
        chat_template: Jinja template for processors that are built here.
        sparse_last_layer: whether the last layer may run at supervised positions only.
    """

    name: str
    model_class: type[PreTrainedModel]
    processor_class: type[ProcessorMixin]
    model_types: tuple[str, ...]
    decoder: str
    connector: tuple[str, ...]
    vision_tower: tuple[str, ...]
    output_class: type
    sizes: Mapping[str, Callable[[], PretrainedConfig]]
    tiny_config: Callable[[int, Callable[[str], int]], PretrainedConfig]
    tiny_processor: Callable[[PreTrainedTokenizerFast], ProcessorMixin]
    special_tokens: tuple[str, ...]
    chat_template: str
    layer_roles: Mapping[str, str] = field(default_factory=lambda: LLAMA_LAYER_ROLES)
    sparse_last_layer: Callable[[PretrainedConfig], bool] = lambda config: True

    def decoder_of(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.decoder)

    def layers_of(self, model: nn.Module) -> list[nn.Module]:
        return list(self.decoder_of(model).layers)

    def modules_at(self, model: nn.Module, paths: tuple[str, ...]) -> list[nn.Module]:
        """Modules at `paths`, where a last component `*` means every child."""
        found = []
        for path in paths:
            if path.endswith(".*"):
                found += model.get_submodule(path.removesuffix(".*")).children()
            else:
                found.append(model.get_submodule(path))
        return found
