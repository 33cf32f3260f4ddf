"""The launches that default tiles give for a 7B decoder, recorded from the launchers themselves on meta tensors."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from triton.runtime.jit import JITFunction

# LLaMA-7B's decoder: hidden and intermediate size, heads, head dimension; a step's samples and rows; a usual rank.
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 4096, 11008, 32, 128
BATCH, ROWS, RANK = 4, 4096, 64
ARCHS = (80, 90, 100, "gfx942")


@contextmanager
def recorded(records: list[dict]) -> Iterator[None]:
    """Kernels called inside are not run: `records` gets what each launch would compile."""
    run = JITFunction.run

    def record(kernel, *args, grid, warmup, **kwargs):
        del grid, warmup
        values = dict(zip(kernel.arg_names, args))
        values |= {name: kwargs.pop(name) for name in tuple(kwargs) if name in kernel.arg_names}
        records.append({"kernel": _name_of(kernel), **_specialised(kernel, values), "options": kwargs})

    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = run


def _name_of(kernel) -> str:
    return f"{inspect.getmodule(kernel.fn).__name__.rsplit('.', 1)[-1]}:{kernel.fn.__name__}"


def _specialised(kernel, values: dict) -> dict:
    """Signature, constants and 16-divisible arguments, as Triton's own specialisation of a call gives them."""
    signature, constants, aligned = {}, {}, []
    for param in kernel.params:
        name, value = param.name, values[param.name]
        signature[name] = _type_of(value)
        if (
            param.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and not param.do_not_specialize)
        ):
            signature[name], constants[name] = "constexpr", value
        elif signature[name][0] == "*" or (
            signature[name] in ("i32", "i64") and value % 16 == 0 and not param.do_not_specialize
        ):
            aligned.append(name)
    return {"signature": signature, "constants": constants, "aligned": aligned}


def _type_of(value) -> str:
    import torch

    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    names |= {torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}
    if isinstance(value, torch.Tensor):
        return "*" + names[value.dtype]
    if hasattr(value, "block_shape"):
        block = f"{names[value.base.dtype]}{list(value.block_shape)}".replace(" ", "")
        return f"tensordesc<{block},{value.layout!r}>" if hasattr(value, "layout") else f"tensordesc<{block}>"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "constexpr"


def record_launches() -> dict[str, dict]:
    """{name: launch} for every architecture and dtype; equal launches of one architecture are kept once."""
    import torch

    launches, seen = {}, set()
    for arch in ARCHS:
        device = arch if isinstance(arch, str) else f"sm_{arch}"
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for case, call in _cases(arch, dtype):
                records: list[dict] = []
                with recorded(records):
                    call()
                for i, launch in enumerate(records):
                    launch = {**launch, "arch": arch}
                    key = repr(sorted(launch.items()))
                    if key not in seen:
                        seen.add(key)
                        part = f" {launch['kernel'].split(':')[1]}" if i else ""
                        launches[f"{device} {str(dtype).removeprefix('torch.')} {case}{part}"] = launch
    return launches


def _cases(arch: int | str, dtype) -> Iterator[tuple[str, object]]:
    import torch

    from mmpeft_kernels import (
        cross_entropy,
        ddown,
        dropout,
        dy_pass,
        lowrank_gemm,
        lowrank_gemm_gluon,
        post_adapter,
        prefix,
        prologue,
        prologue_backward,
        rotary,
    )
    from mmpeft_kernels.segments import SegmentShape

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def prologue_tile(rank):
        return prologue.default_tile(rank, dtype.itemsize, arch)

    seed = empty(dtype=torch.int64)
    x, wide = empty(ROWS, HIDDEN), empty(ROWS, INTERMEDIATE)
    gain, rank = empty(HIDDEN), RANK
    mask = {"p": 0.05, "seed": seed}

    yield "dropout", lambda: dropout.dropped(seed, ROWS, HIDDEN, 0.05)

    norm = {"name": "rms_norm", "gain": gain}
    for ranks in (16, 3 * rank, 3 * 128):
        down = empty(ranks, HIDDEN)
        yield f"prologue rms_norm r{ranks}", lambda d=down: prologue.prologue(
            x, down=d, tile=prologue_tile(d.shape[0]), **norm, **mask
        )  # fmt: skip
    down = empty(rank, INTERMEDIATE)
    in_scale = empty(INTERMEDIATE)
    yield (
        "prologue swiglu",
        lambda: prologue.prologue(wide, wide, name="swiglu", down=down, tile=prologue_tile(rank), **mask),
    )
    yield "prologue swiglu ia3", lambda: prologue.prologue(
        wide, wide, name="swiglu", in_scale=in_scale, tile=prologue_tile(0)
    )  # fmt: skip
    yield "prologue shrink", lambda: prologue.prologue(
        x, down=empty(rank, HIDDEN), tile=prologue_tile(rank), **mask
    )  # fmt: skip
    buffer = empty(ROWS, HIDDEN + rank)
    yield "prologue rms_norm columns", lambda: prologue.prologue(
        x, down=empty(rank, HIDDEN), h_out=buffer[:, :HIDDEN], z_out=buffer[:, HIDDEN:], tile=prologue_tile(rank),
        **norm, **mask,
    )  # fmt: skip
    yield "prologue rms_norm gain", lambda: prologue.prologue(x, tile=prologue_tile(0), **norm)

    backward = {"name": "rms_norm", "gain": gain, "rstd": empty(ROWS, dtype=torch.float32), "dresidual": x}
    for ranks in (16, 3 * rank):
        low_rank = {"da": empty(ROWS, ranks), "down": empty(ranks, HIDDEN), **mask}
        yield (
            f"prologue_backward rms_norm r{ranks}",
            lambda kw=low_rank: prologue_backward.prologue_backward(x, x, **backward, **kw),
        )
    yield (
        "prologue_backward rms_norm gain",
        lambda: prologue_backward.prologue_backward(x, x, need_dgain=True, **backward),
    )
    low_rank = {"da": empty(ROWS, rank), "down": empty(rank, INTERMEDIATE), **mask}
    yield (
        "prologue_backward swiglu",
        lambda: prologue_backward.prologue_backward(wide, wide, wide, name="swiglu", **low_rank),
    )
    yield (
        "prologue_backward swiglu ia3",
        lambda: prologue_backward.prologue_backward(
            wide, wide, wide, name="swiglu", in_scale=in_scale, need_din_scale=True
        ),
    )

    tile = lowrank_gemm.default_tile(arch, dtype.itemsize)
    for ranks in (16, 128):
        segments = (SegmentShape(HIDDEN, ranks),) * 3
        yield (
            f"lowrank_gemm forward r{ranks}",
            lambda s=segments, r=ranks: lowrank_gemm.lowrank_gemm(
                x, empty(3 * HIDDEN, HIDDEN), tile=tile, z=empty(ROWS, 3 * r), u=empty(3 * HIDDEN, r), scaling=2.0,
                segments=s,
            ),
        )  # fmt: skip
    low_rank = {"z": empty(ROWS, rank), "u": empty(HIDDEN, rank), "scaling": 2.0}
    for name, epilogue in {"residual": {"residual": x}, "bias scale": {"bias": gain, "scale": gain}}.items():
        yield (
            f"lowrank_gemm forward {name}",
            lambda kw={**low_rank, **epilogue}: lowrank_gemm.lowrank_gemm(
                wide, empty(HIDDEN, INTERMEDIATE), tile=tile, **kw
            ),
        )
    yield (
        "lowrank_gemm dx",
        lambda: lowrank_gemm.lowrank_gemm(
            wide, empty(INTERMEDIATE, HIDDEN), tile=tile, transposed=False, z=empty(ROWS, rank), u=empty(rank, HIDDEN)
        ),
    )
    if tile.use_tma:
        pointers = lowrank_gemm.default_tile(arch, dtype.itemsize, use_tma=False)
        yield (
            "lowrank_gemm forward pointers",
            lambda: lowrank_gemm.lowrank_gemm(wide, empty(HIDDEN, INTERMEDIATE), tile=pointers, residual=x, **low_rank),
        )

    if arch == 90 and dtype.itemsize == 2:
        for ranks in (16, 128):
            yield (
                f"lowrank_gemm gluon forward r{ranks}",
                lambda r=ranks: lowrank_gemm_gluon.lowrank_gemm(
                    x, empty(3 * HIDDEN, HIDDEN), z=empty(ROWS, 3 * r), u=empty(3 * HIDDEN, r), scaling=2.0,
                    segments=(SegmentShape(HIDDEN, r),) * 3,
                ),
            )  # fmt: skip
        for name, epilogue in {
            "frozen": {},
            "bias residual": {"bias": gain, "residual": x},
            "bias scale": {"bias": gain, "scale": gain},
        }.items():
            yield (
                f"lowrank_gemm gluon forward {name}",
                lambda kw={**(low_rank if epilogue else {}), **epilogue}: lowrank_gemm_gluon.lowrank_gemm(
                    wide, empty(HIDDEN, INTERMEDIATE), **kw
                ),
            )
        yield (
            "lowrank_gemm gluon dx",
            lambda: lowrank_gemm_gluon.lowrank_gemm(
                wide, empty(INTERMEDIATE, HIDDEN), transposed=False, z=empty(ROWS, rank), u=empty(rank, HIDDEN)
            ),
        )

    dy = empty(ROWS, 3 * HIDDEN)
    for ranks, activation in ((16, "identity"), (rank, "tanh"), (128, "identity")):
        yield (
            f"dy_pass r{ranks} {activation}",
            lambda r=ranks, f=activation: dy_pass.dy_pass(
                dy,
                empty(ROWS, 3 * r),
                empty(3 * HIDDEN, r),
                segments=(SegmentShape(HIDDEN, r),) * 3,
                activation=f,
                tile=dy_pass.default_tile(r, dtype.itemsize, arch),
            ),
        )
    for ranks in (16, 3 * rank):
        yield (
            f"ddown rms_norm r{ranks}",
            lambda r=ranks: ddown.ddown(
                empty(ROWS, r),
                x,
                out_dtype=dtype,
                name="rms_norm",
                gain=gain,
                rstd=empty(ROWS, dtype=torch.float32),
                **mask,
            ),
        )
    yield (
        "ddown swiglu",
        lambda: ddown.ddown(empty(ROWS, rank), wide, wide, out_dtype=dtype, name="swiglu", **mask),
    )

    cos, half_kv = empty(1, ROWS // BATCH, HEAD_DIM), HIDDEN // 2
    qkv = empty(ROWS, HIDDEN + 2 * half_kv).split((HIDDEN, half_kv, half_kv), dim=1)
    kv_scale, head_gain = empty(half_kv), empty(HEAD_DIM)
    heads_of = {
        "": [rotary.Heads(qkv[0]), rotary.Heads(qkv[1])],
        " ia3": [
            rotary.Heads(qkv[0]),
            rotary.Heads(qkv[1], kv_scale),
            rotary.Heads(qkv[2], kv_scale, rotated=False),
        ],
        " head norm": [rotary.Heads(qkv[0], None, head_gain), rotary.Heads(qkv[1], None, head_gain)],
    }
    for name, parts in heads_of.items():
        yield f"rotary{name}", lambda p=parts: rotary.rotary(p, cos, cos, head_dim=HEAD_DIM)
        yield (
            f"rotary_backward{name}",
            lambda p=parts: rotary.rotary_backward(
                qkv[: len(p)], p, cos, cos, head_dim=HEAD_DIM, need_dscale=[True] * 3, need_dgain=[True] * 3
            ),
        )

    heads = empty(BATCH, ROWS // BATCH, HEADS, HEAD_DIM).transpose(1, 2)
    lse = empty(BATCH, HEADS, ROWS // BATCH, dtype=torch.float32)
    kv = empty(HEADS, 20, HEAD_DIM)
    prefix_tile = prefix.default_tile(dtype.itemsize, arch)
    yield (
        "prefix",
        lambda: prefix.merge_prefix_(
            heads, kv, kv, heads, lse, scale=1.0, alive=empty(BATCH, ROWS // BATCH, dtype=torch.bool), tile=prefix_tile
        ),
    )
    yield (
        "prefix_backward",
        lambda: prefix.prefix_backward_(heads, heads, kv, kv, heads, lse, heads, scale=1.0, tile=prefix_tile),
    )
    for ranks in (rank, post_adapter.MAX_RANK):
        yield (
            f"post_adapter r{ranks}",
            lambda r=ranks: post_adapter.post_adapter(
                x,
                empty(r, HIDDEN),
                empty(HIDDEN, r),
                activation="tanh",
                residual=x,
                tile=post_adapter.default_tile(r, dtype.itemsize, arch),
                **mask,
            ),
        )
    yield (
        "post_adapter_backward",
        lambda: post_adapter.post_adapter_backward(
            x, x, empty(ROWS, rank), empty(rank, HIDDEN), empty(HIDDEN, rank), activation="tanh", **mask
        ),
    )
    yield (
        "cross_entropy",
        lambda: cross_entropy.cross_entropy_(
            empty(256, 32064), empty(256, dtype=torch.int64), empty(dtype=torch.int64)
        ),
    )
