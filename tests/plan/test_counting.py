"""FLOPs, bytes and launches of single ops."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmpeft_fast.models import FAMILIES
from mmpeft_fast.plan.counting import Recorder, attention_flops, moved_bytes
from mmpeft_fast.plan.parts import PARTS, Regions, part_of
from tests.tiny_models import loss_and_grads, tiny_batch, tiny_model


class Nowhere:
    current = "decoder"


def works_of(function):
    recorder = Recorder(Nowhere())
    with recorder:
        function()
    return dict(recorder.works)


def only_work(function):
    ((work, count),) = works_of(function).items()
    assert count == 1
    return work


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_product_moves_its_operands_once():
    work = only_work(lambda: meta(33, 7) @ meta(7, 130))
    assert (work.part, work.kind, work.launches) == ("gemms", "gemm", 1)
    assert work.flops == 2 * 33 * 7 * 130
    assert work.bytes == 2 * (33 * 7 + 7 * 130 + 33 * 130)
    assert work.weight_flops == 0


def test_a_product_in_place_reads_and_writes_its_target():
    work = only_work(lambda: meta(33, 130).addmm_(meta(33, 7), meta(7, 130)))
    assert work.flops == 2 * 33 * 7 * 130
    assert work.bytes == 2 * (33 * 7 + 7 * 130 + 2 * 33 * 130)


@pytest.mark.parametrize(
    "function, elements",
    [
        (lambda: meta(7, 33).add_(meta(7, 33)), 3 * 7 * 33),
        (lambda: meta(7, 33).copy_(meta(7, 33)), 2 * 7 * 33),
        (lambda: meta(7, 33).zero_(), 7 * 33),
        (lambda: torch.mul(meta(7, 33), meta(7, 33), out=meta(7, 33)), 3 * 7 * 33),
        (lambda: meta(7, 33) + meta(1, 33).expand(7, 33), 2 * 7 * 33 + 33),
        (lambda: torch._foreach_add_([meta(7), meta(33)], [meta(7), meta(33)]), 3 * 40),
    ],
)
def test_bytes_of_elementwise_ops(function, elements):
    assert only_work(function).bytes == 2 * elements


def test_selecting_reads_what_it_writes():
    rows = meta(3, dtype=torch.int64)
    work = only_work(lambda: torch.nn.functional.embedding(rows, meta(1000, 8)))
    assert work.bytes == 2 * (2 * 3 * 8) + 3 * 8


def test_views_allocations_and_ops_on_nothing_are_free():
    def views():
        meta(0, 33).zero_().add_(1)
        x = torch.empty(4, 6, device="meta")
        x.view(2, 12).t()[1:3].unsqueeze(0).expand(3, 2, 2).detach().split(1)

    assert works_of(views) == {}


def test_moved_bytes_of_strided_tensors():
    wide = meta(7, 64)
    assert moved_bytes(wide[:, :33]) == 2 * 7 * 33
    assert moved_bytes(meta(1, 33).expand(7, 33)) == 2 * 33
    assert moved_bytes(meta(0, 33)) == 0
    assert moved_bytes(meta()) == 2


def test_gradients_of_weights_are_told_apart():
    weight, x = meta(33, 7).requires_grad_(), meta(130, 7).requires_grad_()
    recorder = Recorder(Nowhere())
    with recorder:
        torch.nn.functional.linear(x, weight).backward(meta(130, 33))
    flops = {}
    for work, n in recorder.works.items():
        flops[work.phase] = flops.get(work.phase, 0) + n * work.flops
    assert flops == {"forward": 2 * 33 * 7 * 130, "backward": 2 * 2 * 33 * 7 * 130}
    assert sum(n * work.weight_flops for work, n in recorder.works.items()) == 2 * 33 * 7 * 130


def test_attention_counts_as_torch_does():
    q, k, v = meta(2, 4, 33, 16), meta(2, 4, 130, 16), meta(2, 4, 130, 16)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    with FlopCounterMode(display=False) as flops:
        flash(q, k, v, 0.0, False)
    assert attention_flops(q, k, v, backward=False) == flops.get_total_flops()
    work = only_work(lambda: flash(q, q, q, 0.0, True))
    assert work.kind == "attention" and work.causal
    assert not only_work(lambda: flash(q, k, v, 0.0, False)).causal


def test_parts_of_ops():
    assert part_of("decoder", "mm") == "gemms"
    assert part_of("decoder", "prologue rms_norm") == "norms"
    assert part_of("decoder", "prologue_backward swiglu") == "elementwise"
    assert part_of("vision", "mm") == "vision"


def test_regions_follow_forward_and_backward():
    model = tiny_model("llava").requires_grad_(False).train()
    model.model.multi_modal_projector.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    with Regions(model, FAMILIES["llava"]) as regions, Recorder(regions) as recorder:
        loss_and_grads(model, tiny_batch("llava"))
    assert {work.part for work in recorder.works} <= set(PARTS)
    phases = {part: {work.phase for work in recorder.works if work.part == part} for part in PARTS}
    assert phases["vision"] == {"forward"}
    both = {"forward", "backward"}
    assert all(phases[part] == both for part in ("connector", "norms", "gemms", "attention", "elementwise", "head"))
    head = sum(n * work.flops for work, n in recorder.works.items() if work.part == "head")
    rows, hidden, vocabulary = 3 * 78, 256, 60
    assert head == 3 * 2 * rows * hidden * vocabulary
    connector = sum(n * work.weight_flops for work, n in recorder.works.items() if work.part == "connector")
    assert connector == 2 * 3 * 64 * (64 * 256 + 256 * 256)
