"""How a method is stored: one `Form` a method, in a file of its own."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from peft import PeftConfig
from torch import Tensor, nn

from mmpeft_fast.layers.peft_linear import PeftLinear
from mmpeft_fast.methods import Method
from mmpeft_fast.models import Family
from mmpeft_fast.placement import LINEAR_ROLES, NORM_ROLES, Placement

OTHERWISE = "PeftModel.from_pretrained and fuse take it as it is"

# What a method puts on the decoder beside its linear layers.
ATTACHED = ("prefix_encoder", "task_embedding")
# What is read of a configuration, and as what; every other field must have its default.
NAMES = list[str] | str | None
DESCRIPTION = {
    "peft_type": object,
    "auto_mapping": dict | None,
    "peft_version": str | None,
    "base_model_name_or_path": str | None,
    "revision": str | None,
    "task_type": str | None,
    "inference_mode": bool,
    "modules_to_save": list[str] | None,
}
TARGETING = {
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "layers_to_transform": list[int] | int | None,
    "layers_pattern": NAMES,
}


class Slot(NamedTuple):
    """A tensor of the model, its full name and the shape it is stored in; whether the method trains it."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    is_trained: bool = True

    @classmethod
    def of(cls, name: str, tensor: Tensor, *, is_trained: bool = True) -> "Slot":
        return cls(name, tensor, tuple(tensor.shape), is_trained)


class Targets(NamedTuple):
    """What HF PEFT applies a configuration to: its tuner layers by name, the roles that these play, and in which of the
    decoder's layers (None: in all)."""

    sites: Mapping[str, nn.Module]
    roles: tuple[str, ...]
    layers: tuple[int, ...] | None


class Form:
    """A method on disk and as a configuration of HF PEFT.

    Attributes:
        method: the class that is stored so; a subclass of it is another method.
        config: the class of its configuration.
        read: the fields read of a configuration, and as what.
        finds_targets: whether HF PEFT says which modules a configuration means (`Targets`).
        root: what HF PEFT puts before the base model's names.
        down, up: names of a branch's tensors below its layer.
    """

    method: type[Method]
    config: type[PeftConfig]
    read: Mapping[str, Any]
    finds_targets = True
    root = "base_model.model."
    down, up = "branches.{}.down", "branches.{}.up"

    def reads(self, config: PeftConfig) -> bool:
        """Whether a configuration means this form's method, before a tensor file is read (`completed`)."""
        return type(config) is self.config

    def to_config(self, method: Method, placement: Placement, model: nn.Module, family: Family) -> PeftConfig:
        """The configuration, but for modules trained besides (`modules_to_save`)."""
        raise NotImplementedError

    def to_method(
        self, config: PeftConfig, targets: Targets | None, parts: tuple[str, ...], model: nn.Module, family: Family
    ) -> Method:
        """The inverse of `to_config`. Raises ValueError where the method has no exact equivalent.

        parts: what is trained besides; a method may take some of them as its own (`take_parts`).
        """
        raise NotImplementedError

    def take_parts(self, method: Method, parts: tuple[str, ...]) -> tuple[Method, tuple[str, ...]]:
        """A method that names whole parts itself, with those it is trained with, and the parts that are left."""
        return method, parts

    def runs_in_hf_peft(self, method: Method, model: nn.Module, family: Family) -> bool:
        """Whether HF PEFT has the method and its form of it runs on this model."""
        return True

    def settle(self, method: Method, wrapped: nn.Module) -> None:
        """Does to a model that HF PEFT has wrapped what its configuration has no word for."""

    def slots(self, method: Method, model: nn.Module, family: Family) -> dict[str, Slot]:
        """The method's own tensors by the key they are stored by: branches, scales and gains."""
        found = {}
        for role in LINEAR_ROLES:
            for name, linear in sites(model, family, role).items():
                if not isinstance(linear, PeftLinear):
                    continue
                for i, branch in enumerate(linear.branches):
                    for short, key in (("down", self.down.format(i)), ("up", self.up.format(i))):
                        place, is_trained = f"{name}.branches.{i}.{short}", short not in branch.placement.frozen
                        slot = Slot.of(place, getattr(branch, short), is_trained=is_trained)
                        found[f"{self.root}{name}.{key}.weight"] = slot
                    for short in ("inner", "outer", "router"):
                        if getattr(branch, short) is not None:
                            place = f"{name}.branches.{i}.{short}"
                            found[self.root + place] = Slot.of(place, getattr(branch, short))
                if linear.magnitude is not None:
                    found[f"{self.root}{name}.lora_magnitude_vector"] = Slot.of(f"{name}.magnitude", linear.magnitude)
                if linear.in_scale is not None:
                    shape = (1, linear.in_features)
                    found[f"{self.root}{name}.ia3_l"] = Slot(f"{name}.in_scale", linear.in_scale, shape)
                if linear.out_scale is not None:
                    key, shape = "ia3_l" if linear.in_scale is None else "out_scale", (linear.out_features, 1)
                    found[f"{self.root}{name}.{key}"] = Slot(f"{name}.out_scale", linear.out_scale, shape)
        for role in method.place(family.paths.roles).gains:
            adapted = None if role == "final_norm" else method.adapted_layers(len(family.layers_of(model)))
            for name, norm in sites(model, family, role, adapted).items():
                found[f"{self.root}{name}.ln_tuning_layers.weight"] = Slot.of(f"{name}.weight", norm.weight)
        return found

    def derived(self, method: Method, model: nn.Module, family: Family) -> dict[str, Tensor]:
        """Tensors that are stored besides for HF PEFT, and follow from the others."""
        return {}

    def metadata(self, method: Method) -> dict[str, str]:
        """Settings that HF PEFT's configuration has no word for; they go to the tensor file."""
        return {}

    def completed(self, method: Method, metadata: Mapping[str, str], keys: Collection[str]) -> Method:
        """A method read from a configuration, with what a tensor file's metadata and keys add to it."""
        return method


def listed(value: Any) -> Any:
    """A setting as JSON has it: lists for tuples."""
    return [listed(each) for each in value] if isinstance(value, tuple) else value


def tupled(value: Any) -> Any:
    """The inverse: a frozen method's settings are tuples."""
    return tuple(map(tupled, value)) if isinstance(value, list) else value


def sites(model: nn.Module, family: Family, role: str, adapted: Sequence[int] | None = None) -> dict[str, nn.Module]:
    """The modules that play a role in the adapted layers (None: in all), by full name; none where the family lacks
    it."""
    if role == "final_norm":
        return {f"{family.decoder}.{family.paths.norm}": family.paths.norm_of(family.decoder_of(model))}
    if role not in family.paths.roles:
        return {}
    prefix, path = f"{family.decoder}.{family.paths.layers}", family.paths.roles[role]
    layers = family.layers_of(model)
    indices = range(len(layers)) if adapted is None else adapted
    return {f"{prefix}.{idx}.{path}": family.paths.at(layers[idx], role) for idx in indices}


def decoder_pattern(family: Family) -> str:
    """A regular expression for the decoder's name, in a PeftModel and alone."""
    return rf"(.*\.)?{family.decoder.rsplit('.', 1)[-1]}"


def site_pattern(family: Family, roles: Iterable[str], method: Method, model: nn.Module) -> str:
    """A regular expression for the names of all modules that play these roles in the layers that a method adapts."""
    names = "|".join(family.paths.roles[role].replace(".", r"\.") for role in roles)
    adapted = method.adapted_layers(len(family.layers_of(model)))
    layer = r"\d+" if method.layers is None else f"({'|'.join(map(str, adapted))})"
    return rf"{decoder_pattern(family)}\.{family.paths.layers}\.{layer}\.({names})"


def targets_of(found: Mapping[str, nn.Module], family: Family, model: nn.Module) -> Targets:
    """The roles that modules with these names play, and in which layers. Raises ValueError unless every role is played
    in the same layers, and nothing else is adapted."""
    paths, num_layers, left = family.paths, len(family.layers_of(model)), set(found)
    layers_by_role = {}
    for role in (*LINEAR_ROLES, *NORM_ROLES):
        if role in paths.roles:
            names = {f"{family.decoder}.{paths.layers}.{idx}.{paths.roles[role]}": idx for idx in range(num_layers)}
            if played := tuple(idx for name, idx in names.items() if name in left):
                layers_by_role[role] = played
                left -= set(names)
    final = f"{family.decoder}.{paths.norm}"
    roles = (*layers_by_role, *(("final_norm",) if final in left else ()))
    left.discard(final)
    if left:
        raise ValueError(f"add_peft adapts the decoder's linear layers and norms, not {min(left)}; {OTHERWISE}")
    layers = max(layers_by_role.values(), key=len, default=tuple(range(num_layers)))
    for role, played in layers_by_role.items():
        if played != layers:
            missing = min(set(layers).symmetric_difference(played))
            raise ValueError(
                f"expected every role adapted in the same layers, role {role!r} of layer {missing} is not; {OTHERWISE}"
            )
    return Targets(found, roles, None if len(layers) == num_layers else layers)
