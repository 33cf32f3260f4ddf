"""The kernel set in C++ for CPUs (csrc/cpu): one vectorised pass for each elementwise step, masks never in memory.

GEMMs stay with torch. Semantics, arguments and results are those of `kernels_torch`, in float32, bfloat16 and float16.
`unsupported`, which every caller asks first, loads the extension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft_fast.ops import csrc
from mmpeft_fast.ops.kernel_set import HeadTransform, LowRank, Mask, PrologueGrads, PrologueSpec, Rotation
from mmpeft_fast.ops.kernels_torch import adds_in_dx, lowrank_gemm, lowrank_gemm_dx

__all__ = [
    "adds_in_dx", "cross_entropy_", "dy_pass", "heads", "heads_backward", "keep_bits", "lowrank_gemm",
    "lowrank_gemm_dx", "merge_prefix", "post_branch", "prefix_backward", "prologue", "prologue_backward",
    "unsupported",
]  # fmt: skip

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MASK_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = PrologueSpec("none", None, 0.0, None)
_ops = torch.ops.mmpeft_fast_c

# Calls are not recorded (`ops.tape`): here the host is the device.
IS_TAPED = False


def unsupported(x: Tensor) -> str | None:
    """Why this provider cannot run calls on tensors like x, or None."""
    if x.device.type != "cpu":
        return f"tensors on {x.device.type}"
    return csrc.why_unavailable() or (None if x.dtype in _DTYPES else f"{x.dtype}".removeprefix("torch."))


def _scaled_mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha * a b, scaled in the GEMM's accumulator."""
    return a @ b if alpha == 1.0 else torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=alpha)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _mask_arguments(mask: Mask | None) -> tuple[Tensor | None, float, int]:
    return (None, 0.0, 0) if mask is None else (mask.seed, mask.p, mask.stream)


def _inverse_keep(mask: Mask | None) -> float:
    return 1.0 if mask is None else mask.inverse_keep


def keep_bits(seed: Tensor, num_rows: int, num_cols: int, p: float, *, stream: int = 0, itemsize: int = 2) -> Tensor:
    """`ops.dropout.keep_bits`, the same bits."""
    keep = seed.new_empty((num_rows, num_cols), dtype=_MASK_DTYPES[itemsize])
    _ops.keep_bits(seed, p, stream, keep)
    return keep


def _changes(spec: PrologueSpec) -> bool:
    return spec.name != "none" or spec.in_scale is not None


def _run_prologue(
    spec: PrologueSpec,
    x: tuple[Tensor, ...],
    mask: Mask | None,
    rstd: Tensor | None,
    *,
    need_h: bool,
    need_dropped: bool,
    h_out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """h, drop(h) and rstd [M, 1], the first two only where asked; they are x itself where nothing changes it, but for
    an h that goes to h_out."""
    if not _changes(spec) and mask is None and h_out is None:
        return (x[0] if need_h else None), (x[0] if need_dropped else None), None
    if mask is None and need_dropped:
        h, _, rstd = _run_prologue(spec, x, None, rstd, need_h=True, need_dropped=False, h_out=h_out)
        return (h if need_h else None), h, rstd
    gate, up = x if spec.name == "swiglu" else (x[0], None)
    h = h_out
    if h is None and need_h and _changes(spec):
        h = _empty(gate)
    dropped = _empty(gate) if need_dropped else None
    new_rstd = None
    if spec.name == "rms_norm" and rstd is None:
        new_rstd = gate.new_empty(gate.shape[0], dtype=torch.float32)
    _ops.prologue(
        spec.name, gate, up, spec.gain, spec.eps, spec.in_scale, None if rstd is None else rstd.squeeze(1),
        *_mask_arguments(mask), h, dropped, new_rstd,
    )  # fmt: skip
    if need_h and h is None:
        h = gate
    return h, dropped, (rstd if new_rstd is None else new_rstd.unsqueeze(1))


def prologue(
    spec: PrologueSpec,
    x: tuple[Tensor, ...],
    low_rank: LowRank | None,
    *,
    rstd: Tensor | None = None,
    need_h: bool = True,
    h_out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """h, rstd and a: `kernels_torch.prologue`. h and drop(h) are written in one pass over x."""
    mask = None if low_rank is None else low_rank.mask
    need_dropped = low_rank is not None
    h, dropped, rstd = _run_prologue(spec, x, mask, rstd, need_h=need_h, need_dropped=need_dropped, h_out=h_out)
    a = None
    if low_rank is not None:
        a = _scaled_mm(dropped, low_rank.down.to(dropped.dtype).t(), _inverse_keep(mask))
    return (h if need_h else None), (rstd if spec.name == "rms_norm" else None), a


def _ddown(low_rank: LowRank, da: Tensor, dropped: Tensor) -> Tensor:
    return _scaled_mm(da.t(), dropped, _inverse_keep(low_rank.mask)).to(low_rank.down.dtype)


def prologue_backward(
    spec: PrologueSpec,
    dh: Tensor | None,
    x: tuple[Tensor | None, ...],
    rstd: Tensor | None,
    *,
    low_rank: Sequence[tuple[LowRank, Tensor]] = (),
    ddown_wanted: Sequence[bool] = (),
    need_dx: tuple[bool, ...],
    need_dgain: bool = False,
    need_din_scale: bool = False,
    dresidual: Tensor | None = None,
    dx_out: tuple[Tensor, ...] | None = None,
) -> PrologueGrads:
    """`kernels_torch.prologue_backward`: one pass adds the last masked low-rank part, recomputes its drop(h) and
    differentiates; parts on other masks take a pass each. dx takes dh's place where it may."""
    if dresidual is not None and len(x) > 1:
        raise ValueError(f"prologue_backward: expected dresidual with one input only, got it with {len(x)}")
    ddowns: list[Tensor | None] = [None] * len(low_rank)
    # The part whose mask, product and dropped operand the last pass takes.
    fused = None
    if dh is not None and (any(need_dx) or need_dgain or need_din_scale):
        masked = [i for i, (part, _) in enumerate(low_rank) if part.mask is not None]
        fused = masked[-1] if masked else None
    dropped_by: dict[Mask | None, Tensor] = {}
    for i, ((part, da), wanted) in enumerate(zip(low_rank, ddown_wanted, strict=True)):
        if wanted and i != fused:
            key = None if part.mask is None else (part.mask.p, part.mask.stream)
            if key not in dropped_by:
                _, dropped_by[key], _ = _run_prologue(spec, x, part.mask, rstd, need_h=False, need_dropped=True)
            ddowns[i] = _ddown(part, da, dropped_by[key])
        if dh is None or i == fused:
            continue
        if part.mask is None:
            dh.addmm_(da, part.down.to(dh.dtype))
        else:
            _masked_add_(dh, part, da)
    del dropped_by
    nothing = PrologueGrads((None,) * len(x), None, None, ddowns)
    if dh is None or not (any(need_dx) or need_dgain or need_din_scale):
        return nothing

    low = dropped = None
    if fused is not None:
        part, da = low_rank[fused]
        low = da @ part.down.to(dh.dtype)
        dropped = _empty(dh) if ddown_wanted[fused] else None
    mask = None if fused is None else low_rank[fused][0].mask
    din_scale = dgain = None
    if need_din_scale and spec.in_scale is not None:
        din_scale = dh.new_empty(dh.shape[1], dtype=torch.float32)
    if need_dgain and spec.name == "rms_norm":
        dgain = dh.new_empty(dh.shape[1], dtype=torch.float32)
    if not _changes(spec) and low is None and dresidual is None and dx_out is None:
        return nothing._replace(dx=(dh,))
    dx = list(dx_out or (None,) * len(x))
    for i, wanted in enumerate(need_dx):
        if not wanted:
            dx[i] = None
        elif dx_out is None:
            # Each element of dh is read before the first dx is written there; fresh memory would cost page faults.
            dx[i] = dh if i == 0 and dh.is_contiguous() else _empty(dh)
    _ops.prologue_backward(
        spec.name, dh, low, _inverse_keep(mask), *_mask_arguments(mask), x[0], x[1] if len(x) > 1 else None,
        spec.gain, spec.in_scale, None if rstd is None else rstd.squeeze(1), dresidual,
        dx[0], dx[1] if len(x) > 1 else None, dropped, dgain, din_scale,
    )  # fmt: skip
    if dropped is not None:
        ddowns[fused] = _ddown(*low_rank[fused], dropped)
    return PrologueGrads(
        tuple(dx),
        None if dgain is None else dgain.to(spec.gain.dtype),
        None if din_scale is None else din_scale.to(spec.in_scale.dtype),
        ddowns,
    )


def _masked_add_(dh: Tensor, part: LowRank, da: Tensor) -> None:
    """dh += mask (da D) / keep, in place."""
    _ops.prologue_backward(
        "none", dh, da @ part.down.to(dh.dtype), _inverse_keep(part.mask), *_mask_arguments(part.mask),
        None, None, None, None, None, None, dh, None, None, None, None,
    )  # fmt: skip


def _activate(name: str, a: Tensor) -> Tensor:
    if name == "identity":
        return a
    z = _empty(a)
    _ops.activation(name, a, None, z)
    return z


def dy_pass(
    dys: Sequence[Tensor],
    a: Sequence[Tensor | None],
    ups: Sequence[Tensor],
    *,
    scalings: Sequence[float],
    activations: Sequence[str],
    need_da: Sequence[bool],
    need_dup: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """da and dU of each branch: `kernels_torch.dy_pass`. a[i] may be None where nothing needs it."""
    das, dups = [], []
    for dy, a_i, up, scaling, name, wants_da, wants_dup in zip(
        dys, a, ups, scalings, activations, need_da, need_dup, strict=True
    ):
        da = dup = None
        if wants_da:
            da = _scaled_mm(dy, up.to(dy.dtype), scaling)
            if name != "identity":
                _ops.activation(name, a_i, da, da)
        if wants_dup:
            dup = _scaled_mm(dy.t(), _activate(name, a_i), scaling).to(up.dtype)
        das.append(da)
        dups.append(dup)
    return das, dups


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
    """y + s f(a) U^T + residual and a: `kernels_torch.post_branch`."""
    _, _, a = prologue(_PLAIN, (y,), LowRank(down, mask), need_h=False)
    out = torch.addmm(y, _activate(activation, a), up.to(y.dtype).t(), alpha=scaling)
    return (out if residual is None else out.add_(residual)), a


def _as_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, heads * DH] as [B, heads, T, DH], a view."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


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
    """`kernels_torch.heads`."""
    angles = ((rotation.cos_q, rotation.sin_q), (rotation.cos, rotation.sin), (None, None))
    results = []
    for x, transform, (cos, sin), in_place in zip((q, k, v), how, angles, overwrite, strict=True):
        raw = _as_heads(x, head_dim)
        out = raw
        if cos is not None or transform.scale is not None or transform.gain is not None:
            out = raw if in_place else _as_heads(x.new_empty(x.shape), head_dim)
            _ops.heads(raw, transform.scale, transform.gain, eps, cos, sin, out)
        results.append(out)
    return tuple(results)


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
    """`kernels_torch.heads_backward`."""
    angles = ((rotation.cos_q, rotation.sin_q), (rotation.cos, rotation.sin), (None, None))
    results = []
    for i, (dy, x, transform, (cos, sin), (need_x, need_scale, need_gain)) in enumerate(
        zip(grads, raw, how, angles, needs, strict=True)
    ):
        need_scale &= transform.scale is not None
        need_gain &= transform.gain is not None
        if not (need_x or need_scale or need_gain):
            results.append((None, None, None))
            continue
        batch, num_heads, length, _ = dy.shape
        if out is None and cos is None and transform == HeadTransform():
            results.append((dy.transpose(1, 2).flatten(-2), None, None))
            continue
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx = None
        if need_x:
            dx = dy.new_empty(batch, length, num_heads * head_dim) if out is None else out[i]
        dscale = dy.new_empty(num_heads * head_dim, dtype=torch.float32) if need_scale else None
        dgain = dy.new_empty(head_dim, dtype=torch.float32) if need_gain else None
        _ops.heads_backward(
            dy, None if x is None else _as_heads(x, head_dim), transform.scale, transform.gain, eps, cos, sin,
            None if dx is None else _as_heads(dx, head_dim), dscale, dgain,
        )  # fmt: skip
        results.append(
            (
                dx,
                None if dscale is None else dscale.to(transform.scale.dtype),
                None if dgain is None else dgain.to(transform.gain.dtype),
            )
        )
    return results


def merge_prefix(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor, *, scale: float, alive: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`kernels_torch.merge_prefix`; writes out and lse in place."""
    num_queries = q.shape[2]
    if alive is not None:
        alive = alive.expand(q.shape[0], q.shape[1], num_queries)
    _ops.merge_prefix(q, prefix_k, prefix_v, scale, alive, out, lse[..., :num_queries])
    return out, lse


def prefix_backward(
    dout: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels_torch.prefix_backward`; writes dq in place."""
    dprefix_k, dprefix_v = (prefix_k.new_empty(prefix_k.shape, dtype=torch.float32) for _ in range(2))
    _ops.prefix_backward(dout, q, prefix_k, prefix_v, out, lse[..., : q.shape[2]], scale, dq, dprefix_k, dprefix_v)
    return dq, dprefix_k.to(prefix_k.dtype), dprefix_v.to(prefix_v.dtype)


def cross_entropy_(logits: Tensor, labels: Tensor, count: Tensor, *, need_grad: bool) -> Tensor:
    """`kernels_torch.cross_entropy_`."""
    loss = logits.new_empty((), dtype=torch.float32)
    _ops.cross_entropy(logits, labels, count, need_grad, loss)
    return loss
