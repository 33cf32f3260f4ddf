"""What the planner counts equals what a real step on the CPU takes; every family and method is countable on a GPU."""

from collections import Counter

import pytest

from mmpeft_fast.methods import METHODS
from mmpeft_fast.models import FAMILIES
from mmpeft_fast.ops import dispatch
from mmpeft_fast.plan.request import Request
from mmpeft_fast.plan.step import count_step
from tests.plan.real_step import TINY_IMAGE, measured_step, tiny_config_folder
from tests.tiny_models import TEXT_FAMILIES, family_method_cases, small_settings

# A branch of rank 8 takes a launch like one of rank 128, and less time in tests.
SMALL = {"r": 8, "bottleneck": 8}


def request(folder: str, method: str = "lora", **fields) -> Request:
    settings = {key: SMALL.get(key, value) for key, value in small_settings(method, dropout=0.05).items()}
    plain = {"batch_size": 2, "seq_len": 80, "image_size": TINY_IMAGE, "settings": settings}
    return Request(model=folder, method=method, **(plain | fields))


def num_images(family: str) -> int:
    return int(family not in TEXT_FAMILIES)


def check_against_real(wanted: Request) -> None:
    real, counts = measured_step(wanted), count_step(wanted, "cpu")
    assert counts.saved_bytes == real.saved_bytes
    assert sum(count * work.flops for work, count in counts.works.items()) == real.flops
    # A real step also holds a few scalars, and checkpointing a generator's state for each layer.
    assert abs(counts.peak_bytes - real.peak_bytes) <= (0.05 if wanted.checkpointing else 0.001) * real.peak_bytes


@pytest.mark.parametrize("implementation", ["peft", "fused"])
@pytest.mark.parametrize("method", METHODS)
def test_llava_equals_a_real_step(tiny_folders, method, implementation):
    check_against_real(request(tiny_folders["llava"], method, implementation=implementation))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_a_real_step(tiny_folders, family):
    check_against_real(request(tiny_folders[family], batch_size=1, images=num_images(family)))


@pytest.mark.parametrize(
    "fields",
    [
        {"implementation": "frozen"},
        {"implementation": "frozen", "checkpointing": True},
        {"implementation": "peft", "checkpointing": True},
        {"checkpointing": True},
        {"recompute": "gate_up"},
        {"recompute": "gate_up+qkv"},
        {"dtype": "fp32", "train": ("connector",), "batch_size": 3, "seq_len": 133},
        {"images": 0, "seq_len": 7, "batch_size": 1, "supervised_fraction": 1.0},
        {"images": 2, "seq_len": 150},
        {"questions_per_image": 3, "question_tokens": 9},
        {"questions_per_image": 3, "question_tokens": 9, "implementation": "peft"},
    ],
    ids=str,
)
def test_options_equal_a_real_step(tiny_folders, fields):
    check_against_real(request(tiny_folders["llava"], **fields))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_what_questions_have_in_common_is_counted_once(tiny_folders, device_type):
    own, length, questions = 12, 160, 5
    asked = {"batch_size": 2, "seq_len": length, "question_tokens": own}
    asked |= {"questions_per_image": questions, "supervised_fraction": 0.02}
    shared, separate = (
        count_step(request(tiny_folders["llava"], context=context, **asked), device_type)
        for context in ("shared", "separate")
    )
    tokens = (length - own + questions * own) / (questions * length)
    assert tokens < shared.saved_bytes / separate.saved_bytes < 1.2 * tokens
    same = count_step(
        request(tiny_folders["llava"], **asked | {"batch_size": 10, "questions_per_image": 1}), device_type
    )
    assert same.saved_bytes == separate.saved_bytes
    with pytest.raises(ValueError, match=r"context: expected separate for .*: its images are found by rows"):
        count_step(request("qwen-vl-chat", **asked | {"image_size": 448, "seq_len": 400}), device_type)
    with pytest.raises(
        ValueError, match="question_tokens: expected more than the 3 labelled ones and less than seq_len"
    ):
        request(tiny_folders["llava"], **asked | {"question_tokens": 3})


def test_what_is_recomputed_is_counted_as_such(tiny_folders):
    for device_type in ("cpu", "cuda"):
        plain = count_step(request(tiny_folders["llava"]), device_type)
        again = count_step(request(tiny_folders["llava"], recompute="gate_up+qkv"), device_type)
        flops = {
            phase: sum(count * work.flops for work, count in again.works.items() if work.phase == phase)
            for phase in {work.phase for work in again.works}
        }
        more = sum(count * work.flops for work, count in again.works.items())
        more -= sum(count * work.flops for work, count in plain.works.items())
        assert again.saved_bytes < plain.saved_bytes and flops["recompute"] == more > 0


@pytest.mark.parametrize("implementation", ["frozen", "peft", "fused"])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_packed_weights_equal_a_real_step(tiny_folders, base, implementation):
    pytest.importorskip("bitsandbytes")
    check_against_real(request(tiny_folders["llava"], base=base, implementation=implementation))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_what_a_stock_model_cannot_run_is_one_sentence(tiny_folders, device_type):
    """HF PEFT's IA3 makes float32 keys of a bf16 model's 4-bit layers."""
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"expected q, k and v of one dtype|HF PEFT .* cannot run this step"):
        count_step(request(tiny_folders["llava"], "ia3", base="nf4", implementation="peft"), device_type)


def test_packed_weights_on_a_gpu(tiny_folders):
    pytest.importorskip("bitsandbytes")
    dense, packed = (count_step(request(tiny_folders["llava"], base=base), "cuda") for base in ("dense", "nf4"))
    assert packed.weight_bytes < dense.weight_bytes and packed.saved_bytes == dense.saved_bytes
    unpacked = sum(count for work, count in packed.works.items() if work.op == "dequantize_4bit")
    assert unpacked == 2 * 2 * 7  # each linear layer of two decoder layers, forward and backward
    with pytest.raises(ValueError, match="expected dense, nf4 or fp4 on a GPU"):
        count_step(request(tiny_folders["llava"], base="int8"), "cuda")


@pytest.mark.parametrize("family, method", family_method_cases(METHODS))
def test_every_family_and_method_counts_on_a_gpu(tiny_folders, family, method):
    wanted = request(tiny_folders[family], method, images=num_images(family))
    gpu = count_step(wanted, "cuda")
    assert gpu.trainable_params > 0 and gpu.saved_bytes > 0 and gpu.peak_bytes > gpu.weight_bytes
    parts = {work.part for work in gpu.works}
    assert {"norms", "gemms", "attention", "head", "optimizer"} <= parts
    assert ("vision" in parts) == bool(num_images(family))
    names = {work.op for work in gpu.works}
    assert "lowrank_gemm" in names and "prologue rms_norm" in names


@pytest.mark.parametrize("method", ["lora", "adapter", "prefix"])
def test_triton_and_torch_have_the_same_products(tiny_folders, method, monkeypatch):
    monkeypatch.setattr(dispatch, "wants_layout", lambda *shape: False)  # a stack's products by layout are more
    wanted = request(tiny_folders["llava"], method)
    flops = [
        sum(count * work.flops for work, count in count_step(wanted, device).works.items())
        for device in ("cuda", "cpu")
    ]
    assert flops[0] == flops[1]


@pytest.mark.parametrize("implementation", ["frozen", "peft"])
def test_stock_code_takes_flash_attention_on_a_gpu(tiny_folders, implementation):
    counts = count_step(request(tiny_folders["qwen2_vl"], implementation=implementation), "cuda")
    attention = {work.op for work in counts.works if work.part == "attention"}
    assert attention == {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"}
    assert all(work.causal for work in counts.works if work.part == "attention")


def test_checkpointing_recomputes_the_decoder_and_keeps_less(tiny_folders):
    plain, saving = (count_step(request(tiny_folders["llava"], checkpointing=on), "cuda") for on in (False, True))

    def flops(counts, phase):
        return sum(n * work.flops for work, n in counts.works.items() if work.phase == phase)

    decoder = sum(
        n * work.flops
        for work, n in plain.works.items()
        if work.phase == "forward" and work.part not in ("vision", "connector", "inputs", "head")
    )
    assert flops(plain, "recompute") == 0
    # Recomputing ends with the last tensor that a layer has to keep: its final product is left out.
    assert 0.6 * decoder < flops(saving, "recompute") <= decoder
    assert flops(saving, "forward") == flops(plain, "forward")
    # transformers lets the embeddings' result require grad, so the first layer's q, k, v get a gradient of their input.
    assert flops(saving, "backward") == flops(plain, "backward") + 2 * 160 * 3 * (256 * 256 + 256 * 8)
    assert saving.saved_bytes < 0.3 * plain.saved_bytes


def test_counting_twice_gives_the_same_counts(tiny_folders):
    wanted = request(tiny_folders["llava"])
    first, second = (count_step(wanted, "cuda") for _ in range(2))
    assert first == second


def layer_works(tmp_path, **fields) -> Counter:
    """The works of one decoder layer: what a third layer adds."""
    folders = (tiny_config_folder("llava", tmp_path / str(n), num_layers=n) for n in (2, 3))
    two, three = (count_step(request(folder, **fields), "cuda").works for folder in folders)
    return three - two


def layer_counts(tmp_path, **fields) -> Counter:
    """(phase, quantity) of one decoder layer."""
    total = Counter()
    for work, n in layer_works(tmp_path, **fields).items():
        total[work.phase, "gemm flops"] += n * work.flops * (work.kind == "gemm")
        total[work.phase, "weight flops"] += n * work.weight_flops
    return total


def test_a_fused_layer_of_lora_launches_what_it_should(tmp_path):
    """On a GPU without a table: forward by layout (z and s U go to their columns, 0 where a stack has others' rows),
    dX by the library, Triton's kernels for the rest."""
    launched = {phase: Counter() for phase in ("forward", "backward", "optimizer")}
    for work, n in layer_works(tmp_path).items():
        for name in (launch.kernel for launch in work.inside) if work.inside else (work.op,):
            launched[work.phase][name] += n
    sums = {
        "_prologue_backward_kernel": 4,
        "_ddown_kernel": 4,
        "_sum_kernel": 4,
        "_dy_pass_kernel": 4,
        "_finish_kernel": 4,
    }
    assert launched["backward"] == sums | {
        "mm": 4, "_rotary_backward_kernel": 1, "_scaled_dot_product_flash_attention_backward": 1,
    }  # fmt: skip
    assert launched["forward"] == {
        "_prologue_rows_kernel": 2, "_prologue_elements_kernel": 1, "_shrink_kernel": 4,
        "_rotary_kernel": 1, "_scaled_dot_product_flash_attention": 1, "randint": 1,
        "mm": 2, "addmm": 2, "copy_": 3, "mul": 6, "zero_": 2,
        "_to_copy": 5, "addmm_": 1,  # D of every call; o, whose input no prologue writes
    }  # fmt: skip


def test_products_of_a_stock_layer_follow_from_its_parameters(tmp_path):
    tokens, rank, hidden, inner = 160, 8, 256, 688
    frozen = 4 * hidden**2 + 3 * hidden * inner
    trained = rank * (4 * 2 * hidden + 3 * (hidden + inner))
    layer = layer_counts(tmp_path, implementation="peft", fp32_adapters=False)
    assert layer["forward", "gemm flops"] == 2 * tokens * (frozen + trained)
    assert layer["backward", "weight flops"] == 2 * tokens * trained
    assert layer["backward", "gemm flops"] == 2 * tokens * (frozen + 2 * trained)


def test_prefix_of_hf_peft_excludes_checkpointing(tiny_folders):
    with pytest.raises(ValueError, match="expected implementation fused with method prefix"):
        count_step(request(tiny_folders["llava"], "prefix", implementation="peft", checkpointing=True), "cpu")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"images": 2}, "seq_len: expected at least 131 tokens for 2 images of 64 tokens, got 80"),
        ({"image_size": 65}, "image_size: llava takes 64 pixels, got 65"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(tiny_folders, fields, message):
    with pytest.raises(ValueError, match=message):
        count_step(request(tiny_folders["llava"], **fields), "cpu")


def test_images_for_a_model_of_text_are_refused(tiny_folders):
    with pytest.raises(ValueError, match="images: llama reads text alone; expected 0 images a sample"):
        count_step(request(tiny_folders["llama"], images=1), "cpu")
