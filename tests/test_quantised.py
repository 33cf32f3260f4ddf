"""A frozen base in bitsandbytes' formats: fused equals unfused, and nothing of an unpacked weight is kept."""

import copy
import io
import re

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmpeft_fast import METHODS, add_peft, compare, fuse, fuse_report, make_method, merge_peft, saved_bytes, unfuse
from mmpeft_fast.layers.sites import read_linear
from mmpeft_fast.ops.fused_linear import fused_linear, fused_linear_ref
from mmpeft_fast.ops.packed import PackedWeight
from mmpeft_fast.ops.segments import Branch, Segment
from mmpeft_fast.stored.baseline import add_baseline
from mmpeft_fast.stored.checkpoint import load_peft, save_peft
from tests.closeness import assert_same_in_double
from tests.tiny_models import loss_and_grads, randomize_trainable, small_settings, tiny_batch, tiny_model

bnb = pytest.importorskip("bitsandbytes")
from mmpeft_fast.quantised import FORMATS, quantise  # noqa: E402

LORA = LoraConfig(r=3, target_modules=r"(?!.*vision).*\.(q|k|v|o|gate|up|down)_proj", lora_dropout=0.0)
IA3 = IA3Config(target_modules=r".*\.(k|v|down)_proj", feedforward_modules=r".*\.down_proj")


def model_of(kind: str, *, family: str = "llama", dtype=torch.float32, config=LORA, method=None, **options):
    model = quantise(tiny_model(family, dtype=dtype), kind, **{"compute_dtype": torch.float32, **options})
    model = get_peft_model(model, config) if method is None else add_peft(model, small_method(method))
    randomize_trainable(model)
    return model.train()


def small_method(name: str):
    return make_method(name, **small_settings(name))


def assert_fused_as_unfused(model: nn.Module, batch: dict) -> nn.Module:
    loss, grads = loss_and_grads(model, batch)
    fused = fuse(model)
    report = fuse_report(fused)
    assert not report.kept and len(report.formats) == model.config.get_text_config().num_hidden_layers
    fused_loss, fused_grads = loss_and_grads(fused, batch)
    assert abs(fused_loss - loss) <= 2e-6 * abs(loss)
    assert fused_grads.keys() == grads.keys() and grads
    for name, grad in grads.items():
        assert (fused_grads[name] - grad).norm() <= 2e-5 * grad.norm(), name
    return fused


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("config", [LORA, IA3], ids=["lora", "ia3"])
def test_hf_peft_on_a_quantised_base(kind, config):
    assert_fused_as_unfused(model_of(kind, config=config), tiny_batch("llama"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_quantised_base(kind, method):
    model = assert_fused_as_unfused(model_of(kind, method=method), tiny_batch("llama"))
    assert not compare(model, tiny_batch("llama")).differing


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3"])
def test_families(family):
    batch = tiny_batch(family, padding_side="left")
    assert not compare(assert_fused_as_unfused(model_of("nf4", family=family, nested=False), batch), batch).differing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, None], ids=str)
def test_the_dtype_that_it_multiplies_in_is_followed(dtype, compute, caplog):
    """Where it is wider than the activations', results come back in theirs; narrower, layers run unfused."""
    model = fuse(model_of("nf4", dtype=dtype, compute_dtype=compute))
    if (dtype, compute) == (torch.float32, torch.bfloat16):
        model(**tiny_batch("llama"))
        expected = "layer 1 runs unfused: its nf4 weights are multiplied in bfloat16 and what comes is float32"
        assert expected in caplog.text
        return
    batch = tiny_batch("llama")
    comparison = compare(model, batch)
    assert not comparison.differing, comparison
    assert all(row.is_fused for row in comparison.rows)
    del batch["labels"]
    assert model(**batch).logits.dtype == dtype


@pytest.mark.parametrize("kind", FORMATS)
def test_a_wrong_weight_is_seen(kind, monkeypatch):
    """The comparison's truth is the unfused layer's weight, read another way than the fused layer reads it."""
    model = fuse(model_of(kind))
    assert not compare(model, tiny_batch("llama")).differing
    wrong = model.base_model.model.model.layers[1].mlp.down_proj.base_layer
    packed = type(read_linear(wrong).segment.weight)
    unpack = packed.unpack

    def scaled(self, out):
        unpack(self, out)
        if self._linear is wrong:
            out.mul_(1.001)

    monkeypatch.setattr(packed, "unpack", scaled)
    rows = compare(model, tiny_batch("llama")).differing
    assert {row.layer for row in rows if row.what == "output"} == {"model.layers.1"}


def test_under_autocast():
    model, batch = model_of("nf4", compute_dtype=torch.bfloat16), tiny_batch("llama")

    def step(model):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_and_grads(model, batch)

    loss, grads = step(model)
    fused_loss, fused_grads = step(fuse(model))
    assert abs(fused_loss - loss) < 0.01 * abs(loss)
    for name, grad in grads.items():
        assert (fused_grads[name] - grad).norm() < 0.1 * grad.norm(), name


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_kept_is_what_a_dense_base_keeps(kind):
    batch = tiny_batch("llama")

    def kept(model):
        with saved_bytes(model) as saved:
            model(**batch)
        return saved.bytes

    dense = tiny_model("llama")
    dense = fuse(get_peft_model(dense, LORA)).train()
    assert kept(fuse(model_of(kind))) == kept(dense)


def test_checkpointing_copies_pickles_and_unfuse():
    batch = tiny_batch("llama")
    model = model_of("nf4")
    loss, grads = loss_and_grads(model, batch)
    fused = fuse(model)
    pickled = io.BytesIO()
    torch.save(fused, pickled)
    pickled.seek(0)
    checkpointed = copy.deepcopy(fused)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    again = torch.load(pickled, weights_only=False)
    for other in (fused, copy.deepcopy(fused), again, checkpointed, unfuse(copy.deepcopy(fused))):
        other_loss, other_grads = loss_and_grads(other, batch)
        assert abs(other_loss - loss) < 2e-6 * abs(loss)
        assert all((other_grads[name] - grad).norm() < 2e-5 * grad.norm() for name, grad in grads.items())


@pytest.mark.parametrize("kind", FORMATS)
def test_evaluation_neither_repacks_weights_nor_stops_training(kind):
    """bitsandbytes' 4-bit layers pack their weights anew in evaluation on some CPUs, and then train no more."""
    model, batch = fuse(model_of(kind)), tiny_batch("llama")
    loss, _ = loss_and_grads(model, batch)
    with torch.no_grad():
        model.eval()(**batch)
        model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=2, do_sample=False)
    assert torch.equal(loss_and_grads(model.train(), batch)[0], loss)


def test_int8_runs_unfused_in_evaluation(caplog):
    model, batch = model_of("int8").eval(), tiny_batch("llama")
    with torch.no_grad():
        expected = model(**batch).loss
        assert abs(fuse(model)(**batch).loss - expected) < 2e-6 * expected
    assert "layer 1 runs unfused: an 8-bit layer rounds its input to int8 in evaluation" in caplog.text
    assert_fused_as_unfused(unfuse(model).train(), batch)


def test_weights_that_were_packed_for_another_kernel_run_unfused(caplog):
    model, batch = fuse(model_of("nf4")), tiny_batch("llama")
    layer = model.base_model.model.model.layers[0]
    layer.self_attn.k_proj.base_layer.weight.quant_state.packing_format_for_cpu = True
    with torch.no_grad():
        model(**batch)
    assert "layer 0 runs unfused: bitsandbytes has packed its weights" in caplog.text


def test_disabled_and_merged_adapters():
    model, batch = model_of("nf4"), tiny_batch("llama")
    fused = fuse(copy.deepcopy(model))
    with torch.no_grad(), model.disable_adapter(), fused.disable_adapter():
        expected, got = model(**batch).loss, fused(**batch).loss
    assert abs(expected - got) < 2e-6 * abs(expected)


def test_saved_and_loaded(tmp_path):
    batch = tiny_batch("llama")
    model = fuse(model_of("nf4", method="adapter"))
    loss, _ = loss_and_grads(model, batch)
    save_peft(model, tmp_path / "adapter")
    other = load_peft(quantise(tiny_model("llama"), "nf4"), tmp_path / "adapter")
    other_loss, _ = loss_and_grads(fuse(other).train(), batch)
    assert torch.equal(other_loss, loss)
    state = model.state_dict()  # quantisation's own tensors included, as before
    assert any(name.endswith("down_proj.weight.absmax") for name in state)
    assert any(name.endswith("down_proj.branches.0.down") for name in state)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("method", ["lora", "ia3", "layernorm-simp", None])
def test_merged_into_a_dense_model(kind, method, tmp_path, caplog):
    """None is HF PEFT's LoRA."""
    options = {"config": LORA} if method is None else {"method": method}
    model, batch = model_of(kind, **options), tiny_batch("llama")
    loss, _ = loss_and_grads(model, batch)
    if method != "layernorm-simp":
        with pytest.raises(ValueError, match=f"expected dense weights or dequantise=True, .*_proj is in {kind}"):
            merge_peft(model, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
    merged = merge_peft(fuse(model), tmp_path / "merged", dequantise=True)
    assert {type(module) for module in merged.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).loss, loss, rtol=1e-5, atol=0)
        again = type(merged).from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(again(**batch).loss, merged(**batch).loss, rtol=0, atol=0)
    if method != "layernorm-simp":
        assert logged_losses(caplog)[0] == 0.0 and logged_losses(caplog)[1] > 0.01


def logged_losses(caplog) -> list[float]:
    return [float(found) for found in re.findall(r"loses? (\d[\d.e-]*)", caplog.text)]


def test_merging_says_what_rounding_loses(caplog):
    model = model_of("nf4", dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    merge_peft(model, dequantise=True)
    rounded, again = logged_losses(caplog)
    assert 1e-4 < rounded < 0.1 < again


def test_a_quantised_part_is_not_trained():
    model = quantise(tiny_model("llava"), "nf4")
    for add in (add_peft, add_baseline):
        with pytest.raises(ValueError, match=r"expected floating-point weights to train, got linear_1\.weight"):
            add(model, make_method("lora", r=3), train_connector=True)
    assert not hasattr(model, "peft_method")


def test_what_is_not_quantised_yet_is_named():
    model = tiny_model("llama")
    layer = model.model.layers[0]
    layer.self_attn.k_proj = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32)
    model = fuse(add_peft(model, make_method("lora", r=2, targets=("q",))))
    assert "not quantised yet" in str(fuse_report(model))


def test_projections_that_multiply_in_several_dtypes_are_named():
    model = model_of("nf4")
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.compute_dtype = torch.bfloat16
    assert "gate, up share an input but are multiplied in several dtypes" in str(fuse_report(fuse(model)))


class _Doubled(PackedWeight):
    """Half of a weight's elements, in memory."""

    def __init__(self, half, dtype=None):
        super().__init__(half.shape, half.device, dtype)
        self.half = half

    @property
    def tensors(self):
        return (self.half,)

    def unpack(self, out):
        out.copy_(self.half).mul_(2)


@pytest.mark.parametrize("position", ["parallel", "pre", "post"])
def test_a_packed_segment_is_the_dense_one(position):
    """Stacked with others of the call, or alone; its gradients come from a weight that was unpacked again."""
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(8, dtype=torch.float64).requires_grad_()
    halves = [torch.randn(n, 8, dtype=torch.float64) for n in (6, 4)]

    def segments(weight_of):
        torch.manual_seed(1)
        made = []
        for half in halves:
            n = half.shape[0]
            shapes = {"parallel": ((3, 8), (n, 3)), "pre": ((3, 8), (8, 3)), "post": ((3, n), (n, 3))}[position]
            down, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
            made.append(Segment(weight_of(half), None, (Branch(down, up, 0.5, "tanh", position),)))
        return made

    def results(function, weight_of):
        made = segments(weight_of)
        outputs = function(x, made, prologue="rms_norm", gain=gain)
        leaves = [x, gain, *(tensor for segment in made for tensor in segment.branches[0][:2])]
        # Another call in between, whose weights take the same memory.
        fused_linear(x, [Segment(_Doubled(torch.full((10, 8), 3.0, dtype=torch.float64)))])
        return [*outputs, *torch.autograd.grad(sum(y.sin().sum() for y in outputs), leaves)]

    expected = results(fused_linear_ref, lambda half: 2 * half)
    for got, truth in zip(results(fused_linear, _Doubled), expected, strict=True):
        assert_same_in_double(got, truth)


def test_packed_weights_under_checkpointing_threads_and_inference():
    half = torch.randn(6, 8)
    x = torch.randn(3, 8, requires_grad=True)
    expected = torch.autograd.grad((x @ (2 * half).t()).sum(), x)[0]

    def call(x):
        return fused_linear(x, [Segment(_Doubled(half))])

    with torch.inference_mode():
        call(x)
    grads = [torch.autograd.grad(checkpoint(call, x, use_reentrant=False).sum(), x)[0]]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        grads += pool.map(lambda _: torch.autograd.grad(call(x).sum(), x)[0], range(20))
    for grad in grads:
        torch.testing.assert_close(grad, expected)


def test_bad_calls():
    x, half = torch.randn(3, 8), torch.randn(6, 8)
    with pytest.raises(ValueError, match="expected weights that are multiplied in one dtype"):
        fused_linear(x, [Segment(_Doubled(half, torch.bfloat16)), Segment(half)])
    with pytest.raises(ValueError, match=r"expected weight \[N, 9\] in segment 0, got \[6, 8\]"):
        fused_linear(torch.randn(3, 9), [Segment(_Doubled(half))])


def test_a_plain_linear_is_read_without_bitsandbytes_formats():
    assert not isinstance(read_linear(nn.Linear(4, 4)).segment.weight, PackedWeight)
