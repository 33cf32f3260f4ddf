"""The torch provider's dropout on a GPU: its kernel's text compiled for the CPU, and what it costs."""

import ctypes
import shutil
import subprocess

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmpeft_fast import provider
from mmpeft_fast.ops import dropout_gpu
from mmpeft_fast.ops.dropout import zero_dropped
from mmpeft_fast.ops.fused_linear import fused_linear
from mmpeft_fast.ops.segments import Branch, Segment

# What torch's runtime compiler does with the text: one call an element of the broadcast operands, all of one type.
LOOP = """
extern "C" void run(long count, const long* word, const long* row, const long* column, const long* seed, long stream,
                    long threshold, long lanes, long* out) {
  for (long i = 0; i < count; ++i)
    out[i] = zero_dropped<long>(word[i], row[i], column[i], seed[i], stream, threshold, lanes);
}
"""
SEEDS = (0, 2**63 - 1, 0x0123456789ABCDEF)


class Traffic(TorchDispatchMode):
    """Ops that launch, and the bytes that they read and write. Views launch nothing, what is broadcast counts once."""

    def __init__(self):
        super().__init__()
        self.launches, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.name in ("aten::detach", "aten::empty", "aten::empty_like"):
            return result
        self.add(str(func), *tree_leaves((args, kwargs, result)))
        return result

    def add(self, name, *tensors):
        self.launches.append(name)
        self.bytes += sum(span(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))


def span(tensor: torch.Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride else 1
    return elements * tensor.element_size()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """`dropout_gpu.CODE` by g++ in place of torch's runtime compiler, behind the same call."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the kernel's text is not compiled")
    folder = tmp_path_factory.mktemp("dropout")
    (folder / "kernel.cpp").write_text(dropout_gpu.CODE + LOOP)
    command = ["g++", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "kernel.cpp", "-o", "kernel.so"]
    subprocess.run(command, cwd=folder, check=True)
    run = ctypes.CDLL(str(folder / "kernel.so")).run

    def call(*tensors, stream, threshold, lanes):
        operands = [tensor.contiguous() for tensor in torch.broadcast_tensors(*tensors)]
        assert {operand.dtype for operand in operands} == {torch.int64}
        out = torch.empty_like(operands[0])
        pointers = [ctypes.c_void_p(operand.data_ptr()) for operand in operands]
        scalars = [ctypes.c_long(value) for value in (stream, threshold, lanes)]
        run(ctypes.c_long(out.numel()), *pointers, *scalars, ctypes.c_void_p(out.data_ptr()))
        return out

    return call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 8), (5, 37), (70, 4), (9, 264)])
@pytest.mark.parametrize(("seed", "p", "stream"), [*zip(SEEDS, (0.05, 0.5, 0.999), (0, 7, 1 << 20))])
def test_the_kernel_draws_the_masks_of_every_other_provider(kernel, dtype, shape, seed, p, stream):
    xs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2)]
    seed = torch.tensor(seed)
    got = dropout_gpu.zero_dropped(xs, seed, p, stream, kernel=kernel)
    for x, result, expected in zip(xs, got, zero_dropped(xs, seed, p, stream=stream), strict=True):
        assert result.shape == x.shape and result.dtype == x.dtype
        assert torch.equal(result, expected)


@pytest.mark.parametrize("shape", [(300, 4096), (4096, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_costs_what_torchs_dropout_costs(dtype, shape):
    """On meta tensors: the words of x once in and once out, a launch of 8 bytes a row or word of a row beside it;
    torch's reads x, writes it and a byte an element, which it keeps."""
    x, seed = torch.empty(shape, dtype=dtype, device="meta"), torch.empty((), dtype=torch.int64, device="meta")

    def counted(*tensors, **scalars):
        out = torch.empty_like(tensors[0])
        ours.add("kernel", *tensors, out)
        return out

    with Traffic() as ours:
        dropout_gpu.zero_dropped([x], seed, 0.1, 0, kernel=counted)
    with Traffic() as torchs:
        torch.ops.aten.native_dropout(x, 0.1, True)
    assert len(torchs.launches) == 1 and torchs.bytes == 2 * span(x) + x.numel()
    assert [name.split(".")[0] for name in ours.launches] == ["aten", "kernel"] and "arange" in ours.launches[0]
    assert ours.bytes <= torchs.bytes


def test_a_layer_draws_a_mask_once_in_each_direction():
    """Nothing else in the torch provider's step touches the mask: no arithmetic on counters, no integers at all."""
    rows, width, rank = 64, 32, 4
    weight, down, up = (torch.empty(*shape, device="meta") for shape in ((width, width), (rank, width), (width, rank)))
    x = torch.empty(rows, width, device="meta", requires_grad=True)
    branch = Branch(down.requires_grad_(), up.requires_grad_(), scaling=1.0, dropout=0.1)
    seed = torch.empty((), dtype=torch.int64, device="meta")
    for step in ("forward", "backward"):
        with provider("torch"), Traffic() as traffic:
            if step == "forward":
                y = fused_linear(x, [Segment(weight, branches=[branch])], seed=seed)
            else:
                y.backward(torch.empty_like(y))
        drawn = [name for name in traffic.launches if "zero_dropped" in name or "bits" in name or "bitwise" in name]
        assert drawn == ["mmpeft_fast.zero_dropped.default"], (step, traffic.launches)
