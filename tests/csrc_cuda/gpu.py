"""The CUDA ops of the extension behind the methods of `emulation.Kernels`: CPU tensors in and out, strides kept.

Tiles and chunks are the entries' own choice here, so the arguments that choose them in the emulation do nothing.
"""

import importlib

import torch

from mmpeft_fast.ops import csrc


def is_built() -> bool:
    """Whether the installed extension has the CUDA ops."""
    try:
        importlib.import_module("mmpeft_fast._C")
    except ImportError:
        return False
    return hasattr(torch.ops.mmpeft_fast_cuda, "lowrank_gemm_out")


def on_gpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy of the tensor's whole storage, viewed as the tensor views it."""
    if tensor is None:
        return None
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.cuda().as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def on_cpu(tensors) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.cpu() for tensor in tensors)


class Kernels:
    def lowrank_gemm(
        self, x, weight, *, z=None, u=None, num_outs=None, ranks=None, transposed=True, scaling=1.0, bias=None,
        scale=None, residual=None, out=None, block_n=None, num_programs=None,
    ):  # fmt: skip
        num_out = weight.shape[0] if transposed else weight.shape[1]
        if out is None:
            out = torch.full((x.shape[0], -(-num_out // 8) * 8), torch.nan, dtype=x.dtype)[:, :num_out]
        gpu_out = on_gpu(out)
        gpu_residual = gpu_out if residual is out else on_gpu(residual)
        x, weight, z, u, bias, scale = (on_gpu(tensor) for tensor in (x, weight, z, u, bias, scale))
        num_outs, ranks = num_outs or [num_out], ranks or [0 if z is None else z.shape[1]]
        csrc.cuda_op(
            "lowrank_gemm_out", x, weight, z, u, scaling, num_outs, ranks, transposed, bias, scale, gpu_residual,
            gpu_out,
        )  # fmt: skip
        # Everything around `out` too: what the kernel wrote there must show.
        whole = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
        whole.copy_(torch.empty(0, dtype=out.dtype, device="cuda").set_(gpu_out.untyped_storage()))
        return out

    def dy_pass(
        self, dy, a, u, *, num_outs, ranks, scaling=1.0, activation="identity", rows_per_chunk=None, need_da=True,
        need_du=True,
    ):  # fmt: skip
        grads = csrc.cuda_op(
            "dy_pass", on_gpu(dy), on_gpu(a), on_gpu(u), list(num_outs), list(ranks), scaling, activation, need_da,
            need_du,
        )  # fmt: skip
        return on_cpu(grads)
