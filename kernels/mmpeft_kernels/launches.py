"""Every launch of a real step of a 7B decoder, recorded from the launchers themselves on meta tensors: their default
tiles and those of every committed table, fitted to each architecture."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from triton.runtime.jit import JITFunction

from mmpeft_kernels.row_chunks import assumed_multiprocessors
from mmpeft_kernels.tile import assumed_architecture

# LLaMA-7B's decoder: hidden and intermediate size, heads, head dimension; a step's samples and rows.
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 4096, 11008, 32, 128
BATCH, ROWS = 4, 4096
# As many as a Hopper has: reductions are split among them as in a real step.
MULTIPROCESSORS = 132
# Architectures of one instruction set stand together: a launch that all of them take alike is compiled for the first.
FAMILIES = ((80, 86, 89), (90,), (100,), ("gfx942",))
# Ranks of a branch in bfloat16 by architecture. Float16 takes the same paths on every architecture, and float32 the
# same ones on NVIDIA's (no tensor cores), so that one rank on one architecture is enough.
RANKS = {80: (8, 16, 64, 128, 256), 86: (8, 16, 64, 128, 256), 89: (8, 16, 64, 128, 256), 90: (8, 16, 64, 128, 256)}
FEW_RANKS, OTHER_DTYPES = (16, 128), {80: ("float32",), 90: ("float16",)}
TUNED = Path(__file__).with_name("tuned")


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


def record_launches(tuned: Path = TUNED) -> dict[str, dict]:
    """{name: launch} for every architecture and dtype; equal launches are kept once.

    A launch's "arch" is what it is compiled for, "also" names the others of its family that make the same one. tuned:
    the folder of committed tables.
    """
    import torch

    def tuned_cases(arch, dtype):
        return _tuned_cases(arch, dtype, tuned)

    launches: dict[str, dict] = {}
    for family in FAMILIES:
        seen: dict[str, dict] = {}
        # Default tiles first: what a table adds changes no name of theirs.
        for cases, arch in ((cases, arch) for cases in (_cases, tuned_cases) for arch in family):
            for dtype in ("bfloat16", *OTHER_DTYPES.get(arch, ())):
                for case, call in cases(arch, getattr(torch, dtype)):
                    for name, launch in _recorded(call, arch, case):
                        key = json.dumps(launch, sort_keys=True)
                        if key not in seen:
                            device = arch if isinstance(arch, str) else f"sm_{arch}"
                            seen[key] = {**launch, "arch": arch, "also": []}
                            launches[f"{device} {dtype} {name}"] = seen[key]
                        elif arch not in (seen[key]["arch"], *seen[key]["also"]):
                            seen[key]["also"].append(arch)
    return launches


def _recorded(call: Callable, arch: int | str, case: str) -> Iterator[tuple[str, dict]]:
    records: list[dict] = []
    with assumed_architecture(arch), assumed_multiprocessors(MULTIPROCESSORS), recorded(records):
        call()
    for i, launch in enumerate(records):
        yield (f"{case} {launch['kernel'].split(':')[1]}" if i else case), launch


def _empty(*shape, dtype):
    import torch

    return torch.empty(shape, dtype=dtype, device="meta")


class _Linear:
    """Operands of one linear call with branches: `num_branches` of `rank`, behind a prologue of `width` columns."""

    def __init__(self, prologue: str, width: int, num_branches: int, rank: int, dtype, adapter_dtype, dropout: bool):
        import torch

        self.prologue, self.rank, self.dtype, self.adapter_dtype = prologue, num_branches * rank, dtype, adapter_dtype
        self.x = (self.empty(ROWS, width),) * (2 if prologue == "swiglu" else 1)
        self.options = {"name": prologue}
        if prologue == "rms_norm":
            self.options["gain"] = self.empty(width)
        self.statistic = {"rstd": _empty(ROWS, dtype=torch.float32)} if prologue == "rms_norm" else {}
        self.mask = {"p": 0.05, "seed": _empty(dtype=torch.int64)} if dropout else {}
        self.down = _empty(self.rank, width, dtype=adapter_dtype) if self.rank else None
        self.da = self.empty(ROWS, self.rank) if self.rank else None

    def empty(self, *shape):
        return _empty(*shape, dtype=self.dtype)

    def forward(self, **tile) -> None:
        from mmpeft_kernels.prologue import prologue

        prologue(*self.x, down=self.down, **self.options, **self.mask, **tile)

    def backward(self, **options) -> None:
        from mmpeft_kernels.prologue_backward import prologue_backward

        residual = {"dresidual": self.x[0]} if self.prologue == "rms_norm" else {}
        low_rank = {} if self.down is None else {"da": self.da, "down": self.down, **self.mask}
        prologue_backward(self.x[0], *self.x, **self.options, **self.statistic, **residual, **low_rank, **options)

    def ddown(self, **tile) -> None:
        from mmpeft_kernels.ddown import ddown

        options = {**self.options, **self.statistic, **self.mask, **tile}
        ddown(self.da, *self.x, out_dtype=self.adapter_dtype, **options)


def _dy_pass(num_out: int, num_branches: int, rank: int, dtype, up_dtype, **options) -> None:
    from mmpeft_kernels.dy_pass import dy_pass
    from mmpeft_kernels.segments import SegmentShape

    total = num_branches * num_out
    dy_pass(
        _empty(ROWS, total, dtype=dtype), _empty(ROWS, num_branches * rank, dtype=dtype),
        _empty(total, rank, dtype=up_dtype), segments=(SegmentShape(num_out, rank),) * num_branches, **options,
    )  # fmt: skip


def _gemm(launcher, num_out: int, depth: int, num_branches: int, rank: int, dtype, up_dtype, **options) -> None:
    """Forward, `num_branches` segments of `num_out` columns."""
    from mmpeft_kernels.segments import SegmentShape

    total = num_branches * num_out
    if rank:
        options["z"] = _empty(ROWS, num_branches * rank, dtype=dtype)
        options["u"] = _empty(total, rank, dtype=up_dtype)
        options |= {"segments": (SegmentShape(num_out, rank),) * num_branches, "scaling": 2.0}
    launcher(_empty(ROWS, depth, dtype=dtype), _empty(total, depth, dtype=dtype), **options)


def _gemm_dx(launcher, num_out: int, depth: int, dtype, **options) -> None:
    launcher(_empty(ROWS, depth, dtype=dtype), _empty(depth, num_out, dtype=dtype), transposed=False, **options)


def _tuned_cases(arch: int | str, dtype, folder: Path) -> Iterator[tuple[str, Callable]]:
    """The tiles that committed tables name, at their ranks."""
    from mmpeft_kernels.lowrank_gemm import GemmTile, lowrank_gemm
    from mmpeft_kernels.tile import Tile

    name_of = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(dtype).removeprefix("torch.")]
    for path in sorted(folder.glob("*.json")):
        table = json.loads(path.read_text())
        if table.get("architecture", 90) != arch:  # the first table says none: a Hopper's
            continue
        for kernel, buckets in table["tiles"].items():
            for bucket, fields in buckets.items():
                name, *sizes = bucket.split()
                if name != name_of:
                    continue
                rank = {size[0]: int(size[1:]) for size in sizes}["r"]
                case = f"{kernel} r{rank} tile {' '.join(str(value) for value in fields.values())}"
                if kernel.startswith("lowrank_gemm") or kernel == "masked_dx":
                    tile = GemmTile(**fields)
                    launchers = _gemm_launchers(lowrank_gemm, arch, dtype, tile)
                    for part, launcher in [("", lowrank_gemm)] if kernel == "masked_dx" else launchers:
                        yield f"{case}{part}", _tuned_gemm(kernel, launcher, rank, dtype, tile)
                else:
                    yield from _tuned_rows(kernel, case, rank, dtype, Tile(**fields))


def _gemm_launchers(plain: Callable, arch: int | str, dtype, tile) -> Iterator[tuple[str, Callable]]:
    """The GEMMs that take a tile: a table keeps Gluon's under the plain one's name."""
    yield "", plain
    if arch == 90 and dtype.itemsize == 2 and tile.use_tma and tile.num_warps == 8:
        from mmpeft_kernels.lowrank_gemm_gluon import lowrank_gemm

        yield " gluon", lowrank_gemm


def _tuned_gemm(kernel: str, launcher: Callable, rank: int, dtype, tile) -> Callable:
    if kernel == "masked_dx":
        import torch

        branch = {"z": _empty(ROWS, rank, dtype=dtype), "u": _empty(rank, HIDDEN, dtype=torch.float32)}
        mask = {"p": 0.05, "seed": _empty(dtype=torch.int64)}
        return lambda: _gemm_dx(launcher, HIDDEN, INTERMEDIATE, dtype, tile=tile, **branch, **mask)
    if kernel.endswith("dx"):
        return lambda: _gemm_dx(launcher, HIDDEN, INTERMEDIATE, dtype, tile=tile)
    return lambda: _gemm(launcher, HIDDEN, HIDDEN, 1, rank, dtype, dtype, tile=tile)


def _tuned_rows(kernel: str, case: str, rank: int, dtype, tile) -> Iterator[tuple[str, Callable]]:
    if kernel == "dy_pass":
        yield case, lambda: _dy_pass(HIDDEN, 1, rank, dtype, dtype, tile=tile)
        return
    if kernel == "shrink":
        yield case, lambda: _Linear("none", HIDDEN, 1, rank, dtype, dtype, dropout=True).forward(tile=tile)
        return
    for prologue in ("rms_norm", "swiglu"):  # which need what "none" needs, and more
        run = _Linear(prologue, HIDDEN, 1, rank, dtype, dtype, dropout=True).ddown
        yield f"{case} {prologue}", lambda run=run: run(tile=tile)


def _cases(arch: int | str, dtype) -> Iterator[tuple[str, Callable]]:
    import torch

    from mmpeft_kernels import cross_entropy, dropout, lowrank_gemm, lowrank_gemm_gluon, post_adapter, prefix, rotary

    def empty(*shape, dtype=dtype):
        return _empty(*shape, dtype=dtype)

    full = dtype == torch.bfloat16 and arch in RANKS
    ranks = RANKS[arch] if full else FEW_RANKS if dtype == torch.bfloat16 else FEW_RANKS[-1:]
    adapter_dtypes = (dtype, torch.float32) if full else (dtype,)
    seed = empty(dtype=torch.int64)
    mask = {"p": 0.05, "seed": seed}
    yield "dropout", lambda: dropout.dropped(seed, ROWS, HIDDEN, 0.05)

    # Inputs of linears: q, k and v; gate and up; o; down.
    inputs = (("rms_norm", HIDDEN, 3), ("rms_norm", HIDDEN, 2), ("none", HIDDEN, 1), ("swiglu", INTERMEDIATE, 1))
    for (name, width, branches), rank in ((input, rank) for input in inputs for rank in ranks):
        # D in float32 is another kernel than D in bfloat16 whether or not there is dropout: once is enough.
        for dropped, adapters in ((True, dtype), *(((False, dtype), (True, torch.float32)) if full else ())):
            call = _Linear(name, width, branches, rank, dtype, adapters, dropped)
            suffix = f"{name} r{call.rank}{'' if dropped else ' no dropout'}{'' if adapters == dtype else ' fp32 D'}"
            yield f"prologue {suffix}", call.forward
            yield f"prologue_backward {suffix}", call.backward
            yield f"ddown {suffix}", call.ddown
    for rank in ranks:  # where there are rows enough, the shrink is not split
        whole = assumed_multiprocessors(1)(_Linear("none", HIDDEN, 1, rank, dtype, dtype, dropout=True).forward)
        yield f"shrink whole r{rank}", whole
    hidden = empty(ROWS, HIDDEN)
    yield from _scaled_prologues(dtype)
    for name, width in (("rms_norm", HIDDEN), ("swiglu", INTERMEDIATE)):
        frozen = _Linear(name, width, 0, 0, dtype, dtype, dropout=False)
        yield f"prologue {name}", frozen.forward
        yield f"prologue_backward {name}", frozen.backward
    norm = _Linear("rms_norm", HIDDEN, 0, 0, dtype, dtype, dropout=False)
    yield "prologue_backward rms_norm gain", lambda: norm.backward(need_dgain=True)

    for use_tma in (True, False) if isinstance(arch, int) and arch >= 90 and dtype.itemsize == 2 else (False,):
        tile = lowrank_gemm.default_tile(arch, dtype.itemsize, use_tma=use_tma)
        kind = "tma" if use_tma else "pointers"
        for rank, up_dtype in ((rank, up_dtype) for rank in (0, *ranks) for up_dtype in adapter_dtypes):
            for branches in (3, 1):
                yield (
                    f"lowrank_gemm forward {kind} r{rank} x{branches}{'' if up_dtype == dtype else ' fp32 U'}",
                    lambda b=branches, r=rank, u=up_dtype, t=tile: _gemm(
                        lowrank_gemm.lowrank_gemm, HIDDEN, HIDDEN, b, r, dtype, u, tile=t
                    ),
                )
        for name, epilogue in _epilogues(dtype).items():
            yield (
                f"lowrank_gemm forward {kind} {name}",
                lambda kw=epilogue, t=tile: _gemm(
                    lowrank_gemm.lowrank_gemm, HIDDEN, INTERMEDIATE, 1, 64, dtype, dtype, tile=t, **kw
                ),
            )
        yield (
            f"lowrank_gemm dx {kind}",
            lambda t=tile: _gemm_dx(lowrank_gemm.lowrank_gemm, INTERMEDIATE, HIDDEN, dtype, tile=t),
        )
        yield (
            f"lowrank_gemm dx {kind} into",
            lambda t=tile: _gemm_dx(lowrank_gemm.lowrank_gemm, HIDDEN, HIDDEN, dtype, tile=t, residual=hidden),
        )
        for (rank, down_dtype), dropped in product(product(ranks, adapter_dtypes), (True, False)):
            suffix = f"{'' if down_dtype == dtype else ' fp32 D'}{' dropout' if dropped else ''}"
            yield (
                f"lowrank_gemm dx {kind} r{rank}{suffix}",
                lambda t=tile, r=rank, d=down_dtype, m=mask if dropped else {}: _gemm_dx(
                    lowrank_gemm.lowrank_gemm, HIDDEN, INTERMEDIATE, dtype, tile=t, z=empty(ROWS, r),
                    u=empty(r, HIDDEN, dtype=d), **m,
                ),
            )  # fmt: skip
    if arch == 90 and dtype.itemsize == 2:
        gluon = lowrank_gemm_gluon.lowrank_gemm
        for rank, branches in ((rank, branches) for rank in (0, *ranks) for branches in (3, 1)):
            yield (
                f"lowrank_gemm gluon forward r{rank} x{branches}",
                lambda r=rank, b=branches: _gemm(gluon, HIDDEN, HIDDEN, b, r, dtype, dtype),
            )
        for name, epilogue in _epilogues(dtype).items():
            yield (
                f"lowrank_gemm gluon forward {name}",
                lambda kw=epilogue: _gemm(gluon, HIDDEN, INTERMEDIATE, 1, 64, dtype, dtype, **kw),
            )
        yield "lowrank_gemm gluon dx", lambda: _gemm_dx(gluon, INTERMEDIATE, HIDDEN, dtype)
        yield "lowrank_gemm gluon dx into", lambda: _gemm_dx(gluon, HIDDEN, HIDDEN, dtype, residual=hidden)

    for rank, up_dtype in ((rank, up_dtype) for rank in ranks for up_dtype in adapter_dtypes):
        for num_out, branches in ((HIDDEN, 3), (INTERMEDIATE, 2), (HIDDEN, 1)):
            yield (
                f"dy_pass r{rank} x{branches}{'' if up_dtype == dtype else ' fp32 U'}",
                lambda n=num_out, b=branches, r=rank, u=up_dtype: _dy_pass(n, b, r, dtype, u),
            )
    yield "dy_pass r64 tanh", lambda: _dy_pass(HIDDEN, 1, 64, dtype, dtype, activation="tanh")

    yield from _attention_cases(dtype, rotary, prefix)
    for rank in (64, post_adapter.MAX_RANK):
        yield (
            f"post_adapter r{rank}",
            lambda r=rank: post_adapter.post_adapter(
                hidden, empty(r, HIDDEN), empty(HIDDEN, r), activation="tanh", residual=hidden, **mask
            ),
        )
    yield (
        "post_adapter_backward",
        lambda: post_adapter.post_adapter_backward(
            hidden, hidden, empty(ROWS, 64), empty(64, HIDDEN), empty(HIDDEN, 64), activation="tanh", **mask
        ),
    )
    yield (
        "cross_entropy",
        lambda: cross_entropy.cross_entropy_(
            empty(256, 32064), empty(256, dtype=torch.int64), empty(dtype=torch.int64)
        ),
    )


def _epilogues(dtype) -> Mapping[str, dict]:
    vector = _empty(HIDDEN, dtype=dtype)
    return {
        "residual": {"residual": _empty(ROWS, HIDDEN, dtype=dtype)},
        "bias residual": {"bias": vector, "residual": _empty(ROWS, HIDDEN, dtype=dtype)},
        "bias scale": {"bias": vector, "scale": vector},
    }


def _scaled_prologues(dtype) -> Iterator[tuple[str, Callable]]:
    """IA3's input scale, and h and z as columns of one buffer."""
    from mmpeft_kernels.prologue import prologue

    scaled = _Linear("swiglu", INTERMEDIATE, 0, 0, dtype, dtype, dropout=False)
    scaled.options["in_scale"] = scaled.empty(INTERMEDIATE)
    yield "prologue swiglu ia3", scaled.forward
    yield "prologue_backward swiglu ia3", lambda: scaled.backward(need_din_scale=True)
    call = _Linear("rms_norm", HIDDEN, 1, 64, dtype, dtype, dropout=True)
    buffer = call.empty(ROWS, HIDDEN + 64)
    yield "prologue rms_norm columns", lambda: prologue(
        *call.x, down=call.down, h_out=buffer[:, :HIDDEN], z_out=buffer[:, HIDDEN:], **call.options, **call.mask
    )  # fmt: skip


def _attention_cases(dtype, rotary, prefix) -> Iterator[tuple[str, Callable]]:
    import torch

    def empty(*shape, dtype=dtype):
        return _empty(*shape, dtype=dtype)

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
    yield (
        "prefix",
        lambda: prefix.merge_prefix_(
            heads, kv, kv, heads, lse, scale=1.0, alive=empty(BATCH, ROWS // BATCH, dtype=torch.bool)
        ),
    )
    yield (
        "prefix_backward",
        lambda: prefix.prefix_backward_(heads, heads, kv, kv, heads, lse, heads, scale=1.0),
    )
