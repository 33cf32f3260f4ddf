"""The kernel set on Triton: every function hands its operands to a launcher of `mmpeft_kernels`.

What one launch cannot take (several masks, branches that differ in scaling) becomes several launches, never another
result. Semantics and argument shapes are those of `kernels_torch`; `launch` stands for the launcher, which the CUDA
provider replaces by its own of the same signature.
"""

from collections.abc import Sequence

import torch
import triton
from mmpeft_kernels import cross_entropy as cross_entropy_kernel
from mmpeft_kernels import lowrank_gemm as gemm
from mmpeft_kernels import post_adapter as post_adapter_kernel
from mmpeft_kernels import prefix as prefix_kernel
from mmpeft_kernels import prologue as prologue_kernel
from mmpeft_kernels import prologue_backward as prologue_backward_kernel
from mmpeft_kernels import rotary as rotary_kernel
from mmpeft_kernels.ddown import ddown
from mmpeft_kernels.dy_pass import dy_pass as dy_pass_launch
from mmpeft_kernels.segments import SegmentShape
from mmpeft_kernels.tile import Tile, architecture
from torch import Tensor

from mmpeft_fast.ops import dispatch, kernels_torch, stacking
from mmpeft_fast.ops.dropout import keep_bits
from mmpeft_fast.ops.kernel_set import HeadTransform, LowRank, Mask, PrologueGrads, PrologueSpec, Rotation, Term

__all__ = [
    "adds_in_dx", "cross_entropy_", "dy_pass", "heads", "heads_backward", "keep_bits", "lowrank_gemm",
    "lowrank_gemm_dx", "merge_prefix", "post_branch", "prefix_backward", "prologue", "prologue_backward",
    "unsupported",
]  # fmt: skip

# What a call does is recorded and done again from the record (`ops.tape`).
IS_TAPED = True


def unsupported(x: Tensor) -> str | None:
    """Why this provider cannot run calls on tensors like x, or None."""
    if x.dtype == torch.float64:
        return "float64"
    if x.device.type not in ("cuda", "meta") and not triton.knobs.runtime.interpret:
        return f"tensors on {x.device.type}"
    return None


def _mask_options(mask: Mask | None) -> dict:
    return {} if mask is None else {"p": mask.p, "stream": mask.stream, "seed": mask.seed}


def _prologue_options(spec: PrologueSpec) -> dict:
    return {"name": spec.name, "gain": spec.gain, "in_scale": spec.in_scale}


def _tile(kernel: str, x: Tensor, **sizes: int) -> Tile | None:
    """The measured tile of a kernel, None for its default."""
    fields = dispatch.tile_fields(kernel, x, **sizes)
    return None if fields is None else Tile(**fields)


def prologue(
    spec: PrologueSpec,
    x: tuple[Tensor, ...],
    low_rank: LowRank | None,
    *,
    rstd: Tensor | None = None,
    need_h: bool = True,
    h_out: Tensor | None = None,
    launch=prologue_kernel.prologue,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `kernels_torch.prologue`; a known rstd is computed again with the rest of the row."""
    down, mask = (None, None) if low_rank is None else low_rank
    tile = None
    if down is not None:
        tile = _tile("shrink", x[0], m=x[0].shape[0], k=x[0].shape[1], r=down.shape[0])
    h, rstd, a, _ = launch(
        *x, **_prologue_options(spec), **_mask_options(mask), eps=spec.eps, down=down, write_h=need_h, h_out=h_out,
        tile=tile,
    )  # fmt: skip
    return h, None if rstd is None else rstd[:, None], a


def prologue_backward(
    spec: PrologueSpec,
    dh: Tensor | None,
    x: tuple[Tensor | None, ...],
    rstd: Tensor | None,
    *,
    low_rank: Sequence[tuple[LowRank, Tensor]] = (),
    ddown_wanted: Sequence[bool] = (),
    is_in_dh: bool = False,
    need_dx: tuple[bool, ...],
    need_dgain: bool = False,
    need_din_scale: bool = False,
    dresidual: Tensor | None = None,
    dx_out: tuple[Tensor, ...] | None = None,
    launch=prologue_backward_kernel.prologue_backward,
) -> PrologueGrads:
    """As `kernels_torch.prologue_backward`: a launch and a reduction for each dD, one launch for the rest."""
    rstd = None if rstd is None else rstd.view(-1)
    options = _prologue_options(spec)
    ddowns: list[Tensor | None] = []
    for ((down, mask), da), wanted in zip(low_rank, ddown_wanted, strict=True):
        if not wanted:
            ddowns.append(None)
            continue
        tile = _tile("ddown", da, m=da.shape[0], k=down.shape[1], r=down.shape[0])
        ddowns.append(ddown(da, *x, out_dtype=down.dtype, rstd=rstd, tile=tile, **options, **_mask_options(mask)))
    if dh is None:
        return PrologueGrads((None,) * len(x), None, None, ddowns)
    if is_in_dh:
        low_rank = ()
    for (down, mask), da in low_rank[1:]:
        dh = launch(dh, da=da, down=down, **_mask_options(mask)).dx
    product = {}
    if low_rank:
        (down, mask), da = low_rank[0]
        product = {"da": da, "down": down, **_mask_options(mask)}
    if not low_rank and spec.name == "none" and spec.in_scale is None and dresidual is None and dx_out is None:
        return PrologueGrads((dh if need_dx[0] else None,), None, None, ddowns)
    outs = {} if dx_out is None else dict(zip(("dx_out", "dup_out"), dx_out, strict=False))
    tile = None
    if product:
        tile = _tile("prologue_backward", dh, m=dh.shape[0], k=dh.shape[1], r=product["da"].shape[1])
    grads = launch(
        dh, *x, **options, **product, **outs, rstd=rstd, dresidual=dresidual, need_dx=need_dx[0], need_dup=need_dx[-1],
        need_dgain=need_dgain, need_din_scale=need_din_scale, tile=tile,
    )  # fmt: skip
    return PrologueGrads((grads.dx, grads.dup)[: len(x)], grads.dgain, grads.din_scale, ddowns)


def _in_one_launch(terms: Sequence[Term], num_out: int) -> dict | None:
    """The launcher's low-rank operands, or None where one launch cannot take all terms."""
    ends = [0, *(term.stop for term in terms)]
    follow = all(term.start == end for term, end in zip(terms, ends, strict=False)) and ends[-1] == num_out
    if not terms or not follow or len({(term.scaling, term.up.shape[1], term.up.dtype) for term in terms}) > 1:
        return None
    return {
        "z": stacking.columns([term.z for term in terms]),
        "u": stacking.rows([term.up for term in terms]),
        "scaling": terms[0].scaling,
        "segments": [SegmentShape(term.stop - term.start, term.up.shape[1]) for term in terms],
    }


def _gemm_tile(direction: str, x: Tensor, operands: Sequence[Tensor | None], segments, rank: int) -> gemm.GemmTile:
    """The measured tile where there is one, else the default that the operands can take."""
    name = "masked_dx" if rank and direction == "dx" else f"lowrank_gemm {direction}"
    fields = dispatch.tile_fields(name, x, m=x.shape[0], n=operands[1].shape[1], k=x.shape[1], r=rank)
    arch = architecture(x.device)
    aligned = isinstance(arch, int) and arch >= 90 and all(t is None or gemm.can_use_tma(t) for t in (x, *operands))
    for tile in (
        *(() if fields is None else (gemm.GemmTile(**fields),)),
        gemm.default_tile(arch, x.element_size(), use_tma=aligned),
    ):
        whole = not any(segment.num_out % tile.block_n for segment in (segments or ())[:-1])
        if not tile.use_tma or (aligned and whole):
            return tile
    return gemm.default_tile(arch, x.element_size(), use_tma=False)


def _launch_gemm(direction: str, x, weight, out, *, bias=None, residual=None, **low_rank) -> Tensor:
    """Gluon's kernel where it was measured as the fastest and can take the operands, else the plain one."""
    segments, z = low_rank.get("segments"), low_rank.get("z")
    rank = 0 if z is None else max(segment.rank for segment in segments) if segments else z.shape[1]
    tile = _gemm_tile(direction, x, (weight, out, residual), segments, rank)
    launch, transposed = gemm.lowrank_gemm, direction == "fwd"
    may_be_gluon = transposed or not rank  # which draws no mask
    if (
        may_be_gluon
        and tile.use_tma
        and dispatch.gemm_realisation(x, out.shape[1], rank, direction=direction) == "gluon"
    ):
        from mmpeft_kernels import lowrank_gemm_gluon

        launch = lowrank_gemm_gluon.lowrank_gemm
        if z is not None:
            low_rank["u"] = low_rank["u"].to(x.dtype)
    return launch(x, weight, tile=tile, transposed=transposed, bias=bias, residual=residual, out=out, **low_rank)


def lowrank_gemm(
    x: Tensor,
    weight: Tensor,
    terms: Sequence[Term] = (),
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    launch=_launch_gemm,
) -> Tensor:
    """As `kernels_torch.lowrank_gemm`; terms that one launch cannot take are added after it. Where the device's table
    says that the library's GEMM is faster, that runs."""
    num_out = weight.shape[0]
    rank = max((term.up.shape[1] for term in terms), default=0)
    if not x.shape[0]:
        return x.new_empty(0, num_out)
    if dispatch.gemm_realisation(x, num_out, rank, direction="fwd") in ("composite", "layout"):
        return kernels_torch.lowrank_gemm(x, weight, terms, bias=bias, residual=residual)
    together = _in_one_launch(terms, num_out)
    out = x.new_empty(x.shape[0], num_out)
    y = launch("fwd", x, weight, out, bias=bias, residual=residual, **(together or {}))
    for term in () if together else terms:
        y[:, term.start : term.stop].addmm_(term.z, term.up.to(y.dtype).t(), alpha=term.scaling)
    return y


def lowrank_gemm_dx(
    dy: Tensor,
    weight: Tensor,
    *,
    into: Tensor | None = None,
    low_rank: tuple[LowRank, Tensor] | None = None,
    launch=_launch_gemm,
) -> Tensor:
    """As `kernels_torch.lowrank_gemm_dx`: the low-rank part is the first phase of the GEMM, its mask drawn in the
    accumulator. Without a mask the library's GEMMs do it where they are faster."""
    is_masked = low_rank is not None and low_rank[0].mask is not None
    way = dispatch.gemm_realisation(dy, weight.shape[1], 0, direction="dx")
    if way in ("composite", "layout") and not is_masked:
        return kernels_torch.lowrank_gemm_dx(dy, weight, into=into, low_rank=low_rank)
    out = dy.new_empty(dy.shape[0], weight.shape[1]) if into is None else into
    product = {}
    if low_rank is not None:
        (down, mask), da = low_rank
        product = {"z": da, "u": down, **_mask_options(mask)}
    return launch("dx", dy, weight, out, residual=into, **product)


def adds_in_dx(dy: Tensor, num_in: int, low_rank: LowRank) -> bool:
    """As `kernels_torch.adds_in_dx`: always without a mask, with one where the GEMM that draws it is fast
    (`dispatch.draws_in_dx`)."""
    return low_rank.mask is None or dispatch.draws_in_dx(dy, num_in, low_rank.down.shape[0])


def dy_pass(
    dys: Sequence[Tensor],
    a: Sequence[Tensor],
    ups: Sequence[Tensor],
    *,
    scalings: Sequence[float],
    activations: Sequence[str],
    need_da: Sequence[bool],
    need_dup: Sequence[bool],
    launch=dy_pass_launch,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """As `kernels_torch.dy_pass`: one pass over all dy where they are columns of one buffer and agree in the rest.
    Where library GEMMs are faster (`dispatch.dy_realisation`), those run."""
    kinds = {(s, f, up.shape[1], up.dtype) for s, f, up in zip(scalings, activations, ups, strict=True)}
    dy = stacking.as_columns(dys) if len(kinds) == 1 else None
    if launch is dy_pass_launch and all(
        dispatch.dy_realisation(dy_i if dy is None else dy, up.shape[1]) == "composite"
        for dy_i, up in zip(dys, ups, strict=True)
    ):
        return kernels_torch.dy_pass(
            dys, a, ups, scalings=scalings, activations=activations, need_da=need_da, need_dup=need_dup
        )
    if dy is None:
        pairs = [
            _dy_pass(launch, [a_i], [up], dy_i, s, f, da, dup)
            for dy_i, a_i, up, s, f, da, dup in zip(dys, a, ups, scalings, activations, need_da, need_dup, strict=True)
        ]
        return [das[0] for das, _ in pairs], [dups[0] for _, dups in pairs]
    das, dups = _dy_pass(launch, a, ups, dy, scalings[0], activations[0], any(need_da), any(need_dup))
    return (
        [da if wanted else None for da, wanted in zip(das, need_da, strict=True)],
        [dup if wanted else None for dup, wanted in zip(dups, need_dup, strict=True)],
    )


def _dy_pass(launch, a, ups, dy, scaling, activation, need_da, need_dup):
    """One launch of the pass; lists of da and dU by branch."""
    none = [None] * len(ups)
    if not (need_da or need_dup):
        return none, none
    da, dup = launch(
        dy, stacking.columns(a), stacking.rows(ups), segments=[SegmentShape(*up.shape) for up in ups], scaling=scaling,
        activation=activation, need_da=need_da, need_du=need_dup,
        tile=_tile("dy_pass", dy, m=dy.shape[0], n=dy.shape[1], r=ups[0].shape[1]),
    )  # fmt: skip
    return (
        none if da is None else list(da.split([up.shape[1] for up in ups], dim=1)),
        none if dup is None else list(dup.split([up.shape[0] for up in ups])),
    )


def post_branch(
    y: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    scaling: float,
    activation: str,
    mask: Mask | None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `kernels_torch.post_branch`; ranks beyond the kernel's go to the prologue and library GEMMs."""
    if down.shape[0] <= post_adapter_kernel.MAX_RANK:
        return post_adapter_kernel.post_adapter(
            y, down, up, scaling=scaling, activation=activation, residual=residual, **_mask_options(mask)
        )
    _, _, a, z = prologue_kernel.prologue(y, down=down, activation=activation, write_h=False, **_mask_options(mask))
    out = torch.addmm(y, z, up.to(y.dtype).t(), alpha=scaling)
    return (out if residual is None else out.add_(residual)), a


def _launches(rotation: Rotation) -> tuple[tuple[int, ...], ...]:
    """Which of q, k, v share a launch; queries with rotations of their own (the token-sparse tail) do not."""
    return ((0, 1, 2),) if rotation.cos_q is rotation.cos else ((0,), (1, 2))


def _angles(rotation: Rotation, members: Sequence[int]) -> tuple[Tensor, Tensor]:
    return (rotation.cos_q, rotation.sin_q) if members[0] == 0 else (rotation.cos, rotation.sin)


def heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    how: tuple[HeadTransform, ...],
    rotation: Rotation,
    *,
    head_dim: int,
    eps: float,
    overwrite: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels_torch.heads`: one launch, two where q has rows of its own."""
    results = [q, k, v]
    for members in _launches(rotation):
        members = [i for i in members if i < 2 or how[i].scale is not None]
        if not members:
            continue
        parts = [rotary_kernel.Heads(results[i], how[i].scale, how[i].gain, rotated=i < 2) for i in members]
        outs = [
            part.x if overwrite[i] else torch.empty_like(part.x, memory_format=torch.contiguous_format)
            for i, part in zip(members, parts, strict=True)
        ]
        rotary_kernel.rotary(parts, *_angles(rotation, members), head_dim=head_dim, eps=eps, outs=outs)
        for i, out in zip(members, outs, strict=True):
            results[i] = out
    return tuple(out.unflatten(-1, (-1, head_dim)).transpose(1, 2) for out in results)


def _rows_of_heads(dx: Tensor) -> Tensor:
    """[B, heads, T, DH] as [B, T, heads * DH] with rows at one stride; a copy where its layout is another."""
    dx = dx.transpose(1, 2).flatten(-2)
    return dx if dx.stride(0) == dx.shape[1] * dx.stride(1) else dx.contiguous()


def heads_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    raw: tuple[Tensor | None, Tensor | None, Tensor | None],
    how: tuple[HeadTransform, ...],
    rotation: Rotation,
    *,
    head_dim: int,
    eps: float,
    needs: Sequence[tuple[bool, bool, bool]],
    out: tuple[Tensor, ...] | None = None,
) -> list[tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """As `kernels_torch.heads_backward`: one launch, two where q has rows of its own."""
    dys = [_rows_of_heads(dx) for dx in grads]
    outs = list(out) if out is not None else [torch.empty_like(dy, memory_format=torch.contiguous_format) for dy in dys]
    results: list = [None] * 3
    for members in _launches(rotation):
        # v is only copied into its columns: not worth a part where there is nothing to do to it.
        members = [i for i in members if any(needs[i]) and (i < 2 or how[2].scale is not None or out is not None)]
        if not members:
            continue
        launched = rotary_kernel.rotary_backward(
            [dys[i] for i in members],
            [rotary_kernel.Heads(raw[i], scale=how[i].scale, gain=how[i].gain, rotated=i < 2) for i in members],
            *_angles(rotation, members), head_dim=head_dim, eps=eps, need_dscale=[needs[i][1] for i in members],
            need_dgain=[needs[i][2] for i in members], outs=[outs[i] for i in members],
        )  # fmt: skip
        for i, grad in zip(members, launched, strict=True):
            results[i] = (grad.dx if needs[i][0] else None, grad.dscale, grad.dgain)
    return [
        done if done is not None else (dy if need[0] else None, None, None)
        for done, dy, need in zip(results, dys, needs, strict=True)
    ]


def merge_prefix(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor, *, scale: float, alive: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `kernels_torch.merge_prefix`, in place."""
    if alive is not None:
        alive = alive.expand(q.shape[0], 1, q.shape[2])[:, 0].contiguous()
    prefix_kernel.merge_prefix_(q, prefix_k.contiguous(), prefix_v.contiguous(), out, lse, scale=scale, alive=alive)
    return out, lse


def prefix_backward(
    dout: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels_torch.prefix_backward`, dq in place."""
    dprefix_k, dprefix_v = prefix_kernel.prefix_backward_(
        dout, q, prefix_k.contiguous(), prefix_v.contiguous(), out, lse, dq, scale=scale
    )
    return dq, dprefix_k, dprefix_v


def cross_entropy_(logits: Tensor, labels: Tensor, count: Tensor, *, need_grad: bool) -> Tensor:
    """As `kernels_torch.cross_entropy_`."""
    if not logits.shape[0]:
        return kernels_torch.cross_entropy_(logits, labels, count, need_grad=need_grad)
    return cross_entropy_kernel.cross_entropy_(logits, labels, count, need_grad=need_grad)
