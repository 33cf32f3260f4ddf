"""What the package has to know of a model family: where its parts are, and how to build it small and at real sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from mmpeft_fast.layers import known
from mmpeft_fast.layers.class_swap import own_class
from mmpeft_fast.layers.decoder_paths import DecoderPaths
from mmpeft_fast.models.images import ImageKind


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family of transformers. All paths are dotted names below the model; `*` stands for list entries.

    A family of text alone has neither connector nor vision tower, and a tokenizer for its processor.

    Attributes:
        name: key in `FAMILIES`.
        model_class: the class with the language head (`...ForConditionalGeneration`, for text alone `...ForCausalLM`).
        processor_class: what turns text and images into its inputs, loaded with a checkpoint (`from_pretrained`).
        model_types: `config.model_type` values that belong to the family.
        decoder: path of the text model (with `rotary_emb`).
        paths: where the decoder keeps its layers, norms and linear sites.
        connector: paths of what `train_connector` trains: usually the modules between vision tower and decoder.
        vision_tower: paths of the modules between the pixels and the connector.
        image_features: paths of all that makes an image's features in `get_image_features`, modules and parameters.
        why_no_vision_cache: why features that were computed before cannot be given to the model; None: they can.
        why_not_packed: why samples cannot lie behind one another in one row, or None.
        image: what an image is to the model (`images.py`); None for text alone.
        sizes: real configurations by name, each a function without arguments.
        tiny_config: (vocabulary size, id of a token by its text) -> configuration of a few million parameters.
        tiny_processor: tokenizer -> processor.
        special_tokens: tokens a tokenizer for this family must know.
        chat_template: Jinja template for processors that are built here.
        sparse_last_layer: whether the last layer may run at supervised positions only.
        method_settings: what the study (arXiv 2406.05130) set for this family, by the method's name, where that is not
            the method's own default.
        is_publishers: whether a model of another class has this family's modules (loaded by the publisher's own code).
        adopt: gives such a model this package's computation, by classes that `class_swap.restore_class` takes away.
    """

    name: str
    model_class: type[PreTrainedModel]
    processor_class: type
    model_types: tuple[str, ...]
    decoder: str
    output_class: type
    sizes: Mapping[str, Callable[[], PretrainedConfig]]
    tiny_config: Callable[[int, Callable[[str], int]], PretrainedConfig]
    tiny_processor: Callable[[PreTrainedTokenizerFast], ProcessorMixin | PreTrainedTokenizerFast]
    special_tokens: tuple[str, ...]
    chat_template: str
    connector: tuple[str, ...] = ()
    vision_tower: tuple[str, ...] = ()
    image_features: tuple[str, ...] = ()
    why_no_vision_cache: str | None = None
    why_not_packed: str | None = None
    image: ImageKind | None = None
    paths: DecoderPaths = field(default_factory=DecoderPaths)
    sparse_last_layer: Callable[[PretrainedConfig], bool] = lambda config: True
    method_settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    is_publishers: Callable[[nn.Module], bool] = lambda model: False
    adopt: Callable[[nn.Module], None] = lambda model: None

    def decoder_of(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.decoder)

    def layers_of(self, model: nn.Module) -> list[nn.Module]:
        return self.paths.layers_of(self.decoder_of(model))

    def vouch(self, model: nn.Module, *, unless_shipped: bool = False) -> None:
        """Takes the classes of a model as known, as their forwards stand: a publisher's, which `is_publishers` has
        recognised by their parts and `adopt` gives this package's forward, or a registered family's.

        unless_shipped: leaves out what transformers and torch ship, which the table of known classes judges.
        """
        decoder = self.decoder_of(model)
        found = [(own_class(model), "causal_lm"), (own_class(decoder), "decoder")]
        for layer in self.layers_of(model):
            found.append((own_class(layer), "decoder_layer"))
            found += [
                (type(attrgetter(path)(layer)), self.paths.container_role(path)) for path in self.paths.containers
            ]
            norms = [self.paths.at(layer, role) for role in ("input_norm", "post_attention_norm")]
            found += [(type(norm), "rms_norm") for norm in norms]
        found.append((own_class(self.paths.norm_of(decoder)), "rms_norm"))
        for kind, role in found:
            if not (unless_shipped and kind.__module__.partition(".")[0] in ("transformers", "torch")):
                known.accept(kind, role)

    @property
    def usual_images(self) -> int:
        """Images a sample where nobody says how many: one, or none where the model reads text alone."""
        return 1 if self.vision_tower else 0

    def require_connector(self) -> None:
        """Raises ValueError where `train_connector` has nothing to train."""
        if not self.connector:
            raise ValueError(f"family {self.name!r} reads text alone; expected train_connector=False")

    def full_attention(self, model: nn.Module) -> bool:
        """Whether no layer of the decoder has a sliding window: a query sees every key before it but padding."""
        config = self.decoder_of(model).config
        layer_types = getattr(config, "layer_types", None)
        if layer_types:
            return set(layer_types) <= {"full_attention"}
        return getattr(config, "sliding_window", None) is None

    def modules_at(self, model: nn.Module, paths: tuple[str, ...]) -> list[nn.Module]:
        """Modules at `paths`, where a last component `*` means every child."""
        found = []
        for path in paths:
            if path.endswith(".*"):
                found += model.get_submodule(path.removesuffix(".*")).children()
            else:
                found.append(model.get_submodule(path))
        return found
