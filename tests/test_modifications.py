"""Random modifications of a model: whatever is patched, hooked, replaced, merged, frozen, switched or asked for, before
`fuse` or after it, a fused model computes what the unfused one does, or both raise the same kind of error.

A case is its number: `random.Random(number)` draws a family, a method, a batch and one to four modifications with their
times. 200 cases by default, 10,000 with `--nightly`; `--case N` runs one alone (`--case A-B` several). A failing case
prints what it consists of.
"""

import copy
import functools
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from peft import PeftModel, PromptLearningConfig
from torch import nn
from transformers import AttentionInterface

from mmpeft_fast import FAMILIES, add_peft, fuse, make_method, unfuse
from mmpeft_fast.closeness import floor
from mmpeft_fast.layers.class_swap import own_class
from mmpeft_fast.models import base_model
from mmpeft_fast.stored.baseline import add_baseline
from tests.closeness import assert_as_close_as_eager, assert_same_in_double
from tests.test_contract import Patch, choose_attention, doubled, overwrite_attention
from tests.tiny_models import TEXT_FAMILIES, first_text_token, randomize_trainable, tiny_batch, tiny_model

NUM_CASES, NUM_NIGHTLY = 200, 10_000
MODELS = ("llama", "mistral", "qwen2", "qwen3", "llava", "qwen2_vl")
TIMES = ("before fuse", "after fuse", "after a step", "taken back")
LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
PLACES = ("", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm", *LINEARS)
SETTINGS = {
    "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
    "ia3": {},
    "adapter": {"bottleneck": 4, "dropout": 0.0},
    "prefix": {"num_virtual_tokens": 3},
    "layernorm": {},
}
# What a model raises that does not fit what is asked of it.
ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    pickle.PicklingError,
)  # fmt: skip


class DoesNotApply(Exception):
    """The model has no such thing to modify; the modification is left out."""


@dataclass
class Run:
    """What modifications act on. `fused`: whether this run is the fused one."""

    family: str
    model: nn.Module
    batch: dict[str, object]
    patch: Patch
    fused: bool
    wide: bool = False
    """Stay in float64, as the truth for a run of a narrower dtype."""
    narrow: torch.dtype | None = None

    @property
    def base(self) -> nn.Module:
        return base_model(self.model)

    @property
    def layers(self) -> nn.ModuleList:
        return FAMILIES[self.family].decoder_of(self.base).layers

    def peft(self, *, tuner: bool = False) -> PeftModel:
        if not isinstance(self.model, PeftModel):
            raise DoesNotApply
        if tuner and isinstance(self.model.active_peft_config, PromptLearningConfig):
            raise DoesNotApply
        return self.model

    def place(self, rng: random.Random, names=PLACES) -> nn.Module:
        """A decoder layer, a part of one, or now and then the final norm."""
        if rng.random() < 0.1:
            return FAMILIES[self.family].decoder_of(self.base).norm
        return rng.choice(list(self.layers)).get_submodule(rng.choice(names))

    def outcome(self):
        """Loss and gradients by name, or the kind of error."""
        self.model.zero_grad(set_to_none=True)
        output = self.model(**self.batch)
        loss = output[0] if isinstance(output, tuple) else output.loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


Modification = Callable[[Run, random.Random], Callable[[], object] | None]
MODIFICATIONS: dict[str, Modification] = {}


def modification(name: str):
    """Registers a function that modifies a run and, where that can be, returns what takes it back."""

    def register(function: Modification) -> Modification:
        MODIFICATIONS[name] = function
        return function

    return register


def with_attribute(owner, name: str, value) -> Callable[[], None]:
    """Sets an attribute and returns what puts the former state back."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before) if had else delattr(owner, name)


def changed_item(batch, **items):
    before = dict(batch)
    batch.update(items)

    def back():
        batch.clear()
        batch.update(before)

    return back


@modification("class patched")
def patch_class(run, rng):
    module = run.place(rng)
    kind = own_class(module)
    before = kind.forward
    run.patch.setattr(kind, "forward", doubled(before))
    return lambda: setattr(kind, "forward", before)


@modification("instance forward")
def instance_forward(run, rng):
    module = run.place(rng, PLACES[1:])
    kind = type(module)
    return with_attribute(module, "forward", lambda *a, **k: doubled(kind.forward)(module, *a, **k))


@modification("instance of a subclass")
def subclass(run, rng):
    module = run.place(rng, PLACES[1:])
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": doubled(kind.forward)})
    return lambda: setattr(module, "__class__", kind)


@modification("library function patched")
def patch_function(run, rng):
    home = __import__(own_class(run.layers[0]).__module__, fromlist=["_"])
    name = rng.choice([n for n in vars(home) if n in ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")
                       or n in ("create_causal_mask", "eager_attention_forward")])  # fmt: skip
    before = getattr(home, name)
    if name == "create_causal_mask":
        changed = lambda *args, **kwargs: None  # noqa: E731
    elif name == "eager_attention_forward":
        changed = lambda *args, **kwargs: doubled(lambda _, *a, **k: before(*a, **k))(None, *args, **kwargs)  # noqa: E731
    else:
        changed = lambda q, k, *args, **kwargs: (q * 2, before(q, k, *args, **kwargs)[1])  # noqa: E731
    run.patch.setattr(home, name, changed)
    return lambda: setattr(home, name, before)


@modification("forward of the model")
def patch_model(run, rng):
    base = run.base
    forward = base.forward

    def tripled(*args, **kwargs):
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            return output[0] * 3, *output[1:]
        output.loss = output.loss * 3
        return output

    return with_attribute(base, "forward", tripled)


@modification("hook that changes")
def change_by_hook(run, rng):
    module = run.place(rng)

    def double(module, args, output):
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    return module.register_forward_hook(double).remove


@modification("hook that reads")
def read_by_hook(run, rng):
    seen = []
    return run.place(rng).register_forward_hook(lambda module, args, output: seen.append(type(output))).remove


@modification("pre-hook that changes")
def change_by_pre_hook(run, rng):
    module = run.place(rng)

    def double(module, args):
        return (args[0] * 2, *args[1:]) if args else None

    return module.register_forward_pre_hook(double).remove


@modification("backward hook")
def backward_hook(run, rng):
    def double(module, grads, _):
        return tuple(None if grad is None else grad * 2 for grad in grads)

    return run.place(rng).register_full_backward_hook(double).remove


@modification("hook on a gradient")
def gradient_hook(run, rng):
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    if not trained:
        raise DoesNotApply
    return rng.choice(trained).register_hook(lambda grad: grad * 2).remove


@modification("attention chosen by name")
def choose(run, rng):
    name = run.base.config._attn_implementation
    choose_attention(_Holder(run.base), run.patch)
    return lambda: run.base.set_attn_implementation(name)


class _Holder:
    """A plain model with the method that wrappers of HF PEFT have."""

    def __init__(self, model):
        self.get_base_model = lambda: model


@modification("attention overwritten")
def overwrite(run, rng):
    mapping = AttentionInterface._global_mapping
    before = mapping["sdpa"]
    overwrite_attention(None, run.patch)
    return lambda: mapping.__setitem__("sdpa", before)


@modification("eager attention")
def eager(run, rng):
    name = run.base.config._attn_implementation
    run.base.set_attn_implementation("eager")
    return lambda: run.base.set_attn_implementation(name)


@modification("merged")
def merge(run, rng):
    run.peft(tuner=True).merge_adapter()
    return run.model.unmerge_adapter


@modification("adapter disabled")
def disable(run, rng):
    run.peft(tuner=True).base_model.disable_adapter_layers()
    return run.model.base_model.enable_adapter_layers


@modification("second adapter")
def second_adapter(run, rng):
    model = run.peft(tuner=True)
    if "second" in model.peft_config:
        raise DoesNotApply
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second" in name:
                parameter.data = parameter.data.to(run.narrow or torch.float64)
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.05)
    model.set_adapter(rng.choice(("second", "default")))

    def back():
        model.set_adapter("default")
        model.delete_adapter("second")

    return back


@modification("parts frozen or trained")
def toggle(run, rng):
    names = rng.sample([name for name, _ in run.model.named_parameters()], k=3)
    chosen = [run.model.get_parameter(name) for name in names]
    for parameter in chosen:
        parameter.requires_grad_(not parameter.requires_grad)
    return lambda: [parameter.requires_grad_(not parameter.requires_grad) for parameter in chosen]


@modification("mode of some modules")
def switch_mode(run, rng):
    for module in run.model.modules():
        module.training = rng.random() < 0.5


@modification("mode of the model")
def switch_whole(run, rng):
    run.model.train(not run.model.training)
    return lambda: run.model.train(not run.model.training)


@modification("loss function")
def own_loss(run, rng):
    def halved(logits, labels, vocab_size, **kwargs):
        flat = logits[:, :-1].reshape(-1, vocab_size).float()
        return nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1)) / 2

    base = run.base
    had = base.loss_function
    base.loss_function = halved
    return lambda: setattr(base, "loss_function", had)


@modification("labels and loss arguments")
def loss_arguments(run, rng):
    labels = run.batch["labels"]
    count = rng.choice((9, torch.tensor(9), torch.tensor([9])))
    shifted = nn.functional.pad(labels[:, 2:], (0, 2), value=-100)
    kinds = ({"shift_labels": shifted}, {"ignore_index": int(labels.max())}, {"num_items_in_batch": count})
    return changed_item(run.batch, **rng.choice(kinds))


@modification("all labels")
def all_labels(run, rng):
    batch = run.batch
    mask = batch.get("attention_mask")
    ids = batch["labels"].clamp(min=first_text_token())
    return changed_item(batch, labels=ids if mask is None else torch.where(mask == 1, ids, -100))


@modification("what is returned")
def returned(run, rng):
    kinds = ("return_dict", False), ("output_hidden_states", True), ("output_attentions", True), ("use_cache", True)
    return changed_item(run.batch, **dict([rng.choice(kinds)]))


@modification("position_ids")
def positions(run, rng):
    batch_size, length = run.batch["labels"].shape
    ids = torch.arange(length) + 3
    if rng.random() < 0.5:  # packed
        ids = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)])
        if rng.random() < 0.5:
            return changed_item(run.batch, position_ids=ids.expand(batch_size, -1), attention_mask=None)
    return changed_item(run.batch, position_ids=ids.expand(batch_size, -1))


@modification("inputs_embeds")
def embeddings(run, rng):
    if run.batch.get("input_ids") is None or run.family not in TEXT_FAMILIES:
        raise DoesNotApply
    vectors = run.base.get_input_embeddings().weight.detach()[run.batch["input_ids"]]
    return changed_item(run.batch, inputs_embeds=vectors, input_ids=None)


@modification("checkpointing")
def checkpointing(run, rng):
    if isinstance(run.model, PeftModel) and run.model.active_peft_config.is_prompt_learning:
        raise DoesNotApply  # HF PEFT's prefix lives in a cache, which checkpointing switches off
    run.base.gradient_checkpointing_enable({"use_reentrant": rng.random() < 0.5})
    if rng.random() < 0.5:
        run.base.enable_input_require_grads()
    return run.base.gradient_checkpointing_disable


@modification("dtype")
def move_dtype(run, rng):
    dtype = rng.choice((torch.float32, torch.bfloat16))
    run.narrow = torch.float64 if run.wide else dtype
    run.model.to(run.narrow)
    for name, value in run.batch.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            run.batch[name] = value.to(run.narrow)


@modification("copied")
def copied(run, rng):
    run.model = copy.deepcopy(run.model) if rng.random() < 0.5 else pickle.loads(pickle.dumps(run.model))


@modification("unfused and fused again")
def again(run, rng):
    if not run.fused:
        return
    try:
        unfuse(run.model)
    except ValueError as error:
        assert "derived after fuse" in str(error), error
    else:
        fuse(run.model)


@modification("layers dropped or reordered")
def layers(run, rng):
    held = run.layers
    if rng.random() < 0.5:
        del held[1]
        FAMILIES[run.family].decoder_of(run.base).config.num_hidden_layers = 1
        return
    held[0], held[1] = held[1], held[0]


@dataclass(frozen=True)
class Case:
    number: int
    family: str
    method: str
    by_peft: bool
    padding_side: str | None
    modifications: tuple[tuple[str, str], ...] = field(default=())

    @classmethod
    def of(cls, number: int) -> "Case":
        rng = random.Random(number)
        names = rng.sample(sorted(MODIFICATIONS), k=rng.randint(1, 4))
        times = [rng.choice(TIMES) for _ in names]
        family, method, by_peft = rng.choice(MODELS), rng.choice(sorted(SETTINGS)), rng.random() < 0.5
        side = rng.choice(("left", "right", None))
        # Eager attention masks a padding row by float64's minimum, which its float32 softmax turns into nan.
        side = "right" if side == "left" and "eager attention" in names else side
        return cls(number, family, method, by_peft, side, tuple(zip(names, times, strict=True)))


@functools.cache
def prototype(family: str, method: str, by_peft: bool) -> nn.Module:
    model = tiny_model(family, dtype=torch.float64)
    made = make_method(method, **SETTINGS[method])
    model = add_baseline(model, made)[0] if by_peft else add_peft(model, made)
    randomize_trainable(model)
    return model.double().train()


def result_of(case: Case, fused: bool, wide: bool = False):
    """Loss and gradients, or the kind of error, and the dtype that the model ended in."""
    batch = tiny_batch(case.family, batch_size=2, padding_side=case.padding_side, dtype=torch.float64)
    with Patch() as patch:
        model = copy.deepcopy(prototype(case.family, case.method, case.by_peft))
        run = Run(case.family, model, batch, patch, fused, wide)
        try:
            return _outcome(case, run), run.narrow
        except ERRORS as error:
            return (type(error), str(error)), run.narrow


def _outcome(case: Case, run: Run):
    def apply(time: str) -> list[Callable[[], object]]:
        backs = []
        for i, (name, when) in enumerate(case.modifications):
            if when == time:
                try:
                    backs.append(MODIFICATIONS[name](run, random.Random(f"{case.number} {i}")))
                except DoesNotApply:
                    continue
        return [back for back in reversed(backs) if back is not None]

    times = {when for _, when in case.modifications}
    apply("before fuse")
    if run.fused:
        fuse(run.model)
    apply("after fuse")
    if times & {"after a step", "taken back"}:
        run.outcome()
        apply("after a step")
    if "taken back" in times:
        backs = apply("taken back")
        run.outcome()
        for back in backs:
            back()
    return run.outcome()


def check(case: Case) -> str:
    """Raises AssertionError where the fused model differs; otherwise "equal" or "refused"."""
    (expected, dtype), (got, _) = result_of(case, fused=False), result_of(case, fused=True)
    if isinstance(expected[0], type):
        assert isinstance(got[0], type), f"unfused raises {expected[0].__name__}: {expected[1]}; fused does not"
        assert got[0] is expected[0], f"unfused raises {expected}, fused {got}"
        return "refused"
    assert not isinstance(got[0], type), f"fused raises {got[0].__name__}: {got[1]}"
    assert got[1].keys() == expected[1].keys(), f"gradients of {sorted(got[1].keys() ^ expected[1].keys())[:4]}"
    assert torch.equal(got[0].isfinite(), expected[0].isfinite()), f"loss {got[0]}, unfused {expected[0]}"
    finite = [name for name, grad in expected[1].items() if grad.isfinite().all()]
    assert all(got[1][name].isfinite().all() == (name in finite) for name in expected[1]), "gradients not finite"
    if not expected[0].isfinite():
        return "not finite"

    def flat(grads):
        return torch.cat([grads[name].double().flatten() for name in sorted(finite)] or [torch.zeros(1)])

    if dtype in (None, torch.float64):
        assert_same_in_double(got[0].double(), expected[0].double(), "loss")
        # What is zero but for rounding (a key's bias, which softmax does not see) has no relative error.
        least = floor(torch.float32) * torch.linalg.vector_norm(flat(expected[1]))
        for name in finite:
            if max(torch.linalg.vector_norm(grads[name]) for grads in (got[1], expected[1])) > least:
                assert_same_in_double(got[1][name], expected[1][name], name)
        return "equal"
    truth = result_of(case, fused=False, wide=True)[0]

    assert_as_close_as_eager(got[0].to(dtype), expected[0].to(dtype), truth[0], "loss")
    assert_as_close_as_eager(flat(got[1]).to(dtype), flat(expected[1]).to(dtype), flat(truth[1]), "all gradients")
    return "equal"


def pytest_generate_tests(metafunc):
    if "number" in metafunc.fixturenames:
        count = NUM_NIGHTLY if metafunc.config.getoption("--nightly") else NUM_CASES
        first, _, last = (metafunc.config.getoption("--case") or f"0-{count}").partition("-")
        metafunc.parametrize("number", range(int(first), int(last or int(first) + 1)))


@pytest.mark.filterwarnings("ignore")
def test_fused_equals_unfused(number):
    case = Case.of(number)
    try:
        check(case)
    except AssertionError as error:
        pytest.fail(f"{error}\n{case}", pytrace=False)
