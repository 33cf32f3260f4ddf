"""`mmpeft_fast.profile` around user code: exact counts, sums, roles, and nothing left behind."""

import json

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import _get_current_dispatch_mode

import mmpeft_fast
from mmpeft_fast import LoRA, add_peft, fuse
from mmpeft_fast.plan.devices import device_named
from mmpeft_fast.profiling import session
from mmpeft_fast.profiling.rows import by_part, total
from mmpeft_fast.profiling.storages import ROLES
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model


def fused_lora(dropout: float = 0.0) -> nn.Module:
    model = fuse(add_peft(tiny_model("llava", num_layers=1), LoRA(r=4, dropout=dropout)))
    randomize_trainable(model)
    return model.train()


def rows_named(rows, op: str) -> list:
    return [row for row in rows if row.op == op]


@pytest.mark.parametrize("m, k, n", [(130, 33, 7), (1, 33, 130), (0, 7, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_has_exactly_its_flops_and_bytes(m, k, n, dtype):
    x, w = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    with mmpeft_fast.profile() as p:
        for _ in range(3):
            x @ w.t()
    (row,) = p.rows
    assert (row.op, row.part, row.phase, row.calls, row.launches) == ("mm", "gemms", "forward", 3, 3)
    assert row.flops == 3 * 2 * m * k * n
    assert row.bytes == 3 * dtype.itemsize * (m * k + n * k + m * n)
    assert 0 < row.seconds < p.seconds


@pytest.mark.parametrize("m, k, n", [(130, 130, 130), (130, 7, 1)])
def test_the_roofline_is_the_longer_of_flops_and_bytes(m, k, n):
    device = device_named("cpu")
    with mmpeft_fast.profile(device=device) as p:
        torch.ones(m, k) @ torch.ones(k, n)
    (row,) = rows_named(p.rows, "mm")
    compute_s, memory_s = row.flops / device.gemm_rate("fp32", row.flops), row.bytes / device.bytes_per_s
    assert (compute_s > memory_s) == (n > 1)
    assert row.ideal_seconds == max(compute_s, memory_s)
    assert row.roofline_fraction == row.ideal_seconds / row.seconds


def test_a_strided_operand_counts_its_elements_once():
    x, w = torch.randn(66, 33)[::2], torch.randn(7, 33)
    with mmpeft_fast.profile() as p:
        torch.mm(x, w.t())
        x.sum(dim=0).expand(5, 33).contiguous()
    assert rows_named(p.rows, "mm")[0].bytes == 4 * (33 * 33 + 7 * 33 + 33 * 7)
    assert rows_named(p.rows, "clone")[0].bytes == 4 * (33 + 5 * 33)


def test_launches_are_what_torchs_profiler_counts():
    model, batch = fused_lora(), tiny_batch("llava", batch_size=2)
    loss_and_grads(model, batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(**batch).loss.backward()
    counted = {event.key.split("::")[-1]: event.count for event in profiler.key_averages()}
    with mmpeft_fast.profile(model) as p:
        model(**batch).loss.backward()
    launches = {}
    for row in p.rows:
        launches[row.op.split()[0]] = launches.get(row.op.split()[0], 0) + row.launches
    names = (
        "mm",
        "addmm",
        "native_layer_norm",
        "embedding",
        "convolution",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    assert {name: launches.get(name, 0) for name in names} == {name: counted.get(name, 0) for name in names}


def test_parts_sum_to_the_whole_and_to_the_trace():
    model, batch = fused_lora(), tiny_batch("llava", batch_size=2)
    with mmpeft_fast.profile(model, device=device_named("cpu")) as p:
        model(**batch).loss.backward()
    whole, parts = total(p.rows), by_part(p.rows)
    for name in ("calls", "launches", "flops", "bytes"):
        assert sum(getattr(row, name) for row in parts) == getattr(whole, name)
    assert sum(row.seconds for row in parts) == pytest.approx(whole.seconds)
    assert {"vision", "norms", "gemms", "attention", "head"} <= {row.part for row in parts}
    marks = [e for e in json.loads(p.trace)["traceEvents"] if e.get("name", "").startswith("mmpeft_fast ")]
    assert whole.launches == len(marks)
    assert whole.seconds < sum(mark["dur"] for mark in marks) * 1e-6 < p.seconds
    assert whole.ideal_seconds > 0 and all(row.roofline_fraction is not None for row in p.rows)


def test_results_are_those_without_a_profile():
    model, batch = fused_lora(dropout=0.1), tiny_batch("llava", batch_size=2)
    torch.manual_seed(3)
    expected_loss, expected = loss_and_grads(model, batch)
    torch.manual_seed(3)
    with mmpeft_fast.profile(model):
        loss, grads = loss_and_grads(model, batch)
    assert torch.equal(loss, expected_loss)
    assert grads.keys() == expected.keys() and all(torch.equal(grads[name], expected[name]) for name in grads)


def test_phases_and_roles_of_a_training_step():
    model = nn.Linear(33, 7, bias=False)
    optimizer, x = torch.optim.AdamW(model.parameters()), torch.randn(130, 33)

    def step():
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with mmpeft_fast.profile() as p:
        step()
        step()
    assert {row.phase for row in p.rows} == {"forward", "backward", "optimizer"}
    assert {row.phase for row in rows_named(p.rows, "mm")} == {"forward", "backward"}
    assert all((row.part == "optimizer") == (row.phase == "optimizer") for row in p.rows)
    held = p.timeline.peak_by_role()
    weight = 33 * 7 * 4
    assert held["parameters"] == weight
    assert held["optimizer states"] == 2 * weight + 4  # two moments and the count of steps
    assert held["saved for backward"] == 130 * 7 * 4  # y
    assert held["other"] >= 130 * 33 * 4  # x was there before


def test_a_gradient_is_known_without_an_optimizer():
    model = nn.Linear(33, 7)
    with mmpeft_fast.profile(model) as p:
        model(torch.randn(5, 33)).sum().backward()
    last = dict(zip(ROLES, p.timeline.bytes[-1], strict=True))
    assert last["gradients"] == last["parameters"] == 4 * (33 * 7 + 7)
    assert last["saved for backward"] == 0


def test_what_is_saved_dies_with_its_graph():
    x = torch.randn(33, requires_grad=True)
    with mmpeft_fast.profile() as p:
        y = x.exp()  # saves its output
        del y
    saved = [dict(zip(ROLES, point, strict=True))["saved for backward"] for point in p.timeline.bytes]
    assert max(saved) == 33 * 4 and saved[-1] == 0


def test_nothing_is_left_behind_after_an_exception(tmp_path):
    model, batch = fused_lora(), tiny_batch("llava", batch_size=1)
    model(**batch)  # transformers hooks into its modules at the first call
    before, hooked = [dict(hooks) for hooks in _optimizer_hooks()], _num_hooks(model)
    with pytest.raises(ZeroDivisionError), mmpeft_fast.profile(model, tmp_path / "out") as p:
        model(**batch)
        raise ZeroDivisionError
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == []
    assert p.rows == [] and p.trace == ""
    assert _get_current_dispatch_mode() is None
    assert [dict(hooks) for hooks in _optimizer_hooks()] == before
    assert torch._C._autograd._saved_tensors_hooks_is_enabled()
    assert _num_hooks(model) == hooked
    saved = []
    y = torch.randn(3, requires_grad=True).exp()
    saved.append(y.grad_fn._saved_result)
    assert saved[0].data_ptr() == y.data_ptr()
    with p:  # it can be used again
        torch.ones(3).sum()
    assert {row.op for row in p.rows} == {"ones", "sum"}


def _optimizer_hooks():
    return torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks


def _num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_running_profile_cannot_start_again():
    with mmpeft_fast.profile() as p, pytest.raises(RuntimeError, match="this one still runs"):
        p.__enter__()


def test_a_trace_without_ops_is_an_error(monkeypatch):
    monkeypatch.setattr(session, "spans", lambda events, *, on_gpu: ({}, {}))
    said = "expected ops in the trace of 1 ops, torch's profiler recorded none"
    with pytest.raises(RuntimeError, match=said), mmpeft_fast.profile():
        torch.ones(3)
    assert _get_current_dispatch_mode() is None


def test_an_empty_block_has_no_rows(tmp_path):
    with mmpeft_fast.profile(output=tmp_path / "out") as p:
        pass
    assert p.rows == [] and p.timeline.peak_bytes == 0
    assert "peak of memory" in p.table()
    assert (tmp_path / "out" / "report.html").exists()


def test_the_table_names_parts_ops_and_roles(tmp_path):
    with mmpeft_fast.profile() as p:
        torch.randn(7, 33) @ torch.randn(33, 7)
    text = p.table(num_ops=1)
    for words in ("part", "gemms", "slowest ops", "saved for backward", "peak of memory"):
        assert words in text
    assert p.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    names = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert names == {"trace_code.json", "profile.json", "report.html"}
