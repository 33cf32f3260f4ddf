"""The kernel set in plain torch: library GEMMs with `addmm` for the low-rank part, elementwise torch for the rest.

Always there, on every device and in every float dtype; the definition that other providers are tested against.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.ops.activations import ACTIVATIONS, accumulate_dtype, activation_backward
from mmpeft_fast.ops.dropout import keep_bits, zero_dropped
from mmpeft_fast.ops.kernel_set import HeadTransform, LowRank, Mask, PrologueGrads, PrologueSpec, Rotation, Term
from mmpeft_fast.ops.norms import rms_norm_backward, rms_norm_forward
from mmpeft_fast.ops.rotary import rotate, rotate_backward

__all__ = [
    "adds_in_dx", "cross_entropy_", "dy_pass", "heads", "heads_backward", "keep_bits", "lowrank_gemm",
    "lowrank_gemm_dx", "merge_prefix", "post_branch", "prefix_backward", "prologue", "prologue_backward",
    "unsupported",
]  # fmt: skip

# Calls are not recorded (`ops.tape`): on a GPU few rows come here, on a CPU the host is the device.
IS_TAPED = False


def unsupported(x: Tensor) -> str | None:
    """Why this provider cannot run calls on tensors like x, or None."""
    return None


def _scaled_mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha * a b, scaled in the GEMM's accumulator: one rounding and no pass of its own."""
    return a @ b if alpha == 1.0 else torch.addmm(a.new_empty(1), a, b, beta=0, alpha=alpha)


def _dropped(mask: Mask | None, *xs: Tensor) -> Sequence[Tensor]:
    """Each x with elements dropped; the factor 1 / keep is left to the rank-sized side."""
    return xs if mask is None else zero_dropped(xs, mask.seed, mask.p, stream=mask.stream)


def _inverse_keep(mask: Mask | None) -> float:
    return 1.0 if mask is None else mask.inverse_keep


def _prologue_h(
    spec: PrologueSpec,
    x: tuple[Tensor, ...],
    rstd: Tensor | None,
    activated: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h and rstd; `activated` is silu(gate) where it is known already; out: where h goes, if that is given."""
    last = out if spec.in_scale is None else None
    if spec.name == "rms_norm":
        h, rstd = rms_norm_forward(x[0], spec.gain, spec.eps, rstd, out=last)
    elif spec.name == "swiglu":
        silu = torch.nn.functional.silu(x[0]) if activated is None else activated
        h = torch.mul(silu, x[1], out=silu if last is None and activated is None else last)
    else:
        h = x[0] if last is None else last.copy_(x[0])
    if spec.in_scale is not None:
        h = (h * spec.in_scale).to(h.dtype) if out is None else torch.mul(h, spec.in_scale, out=out)
    return h, rstd


def prologue(
    spec: PrologueSpec,
    x: tuple[Tensor, ...],
    low_rank: LowRank | None,
    *,
    rstd: Tensor | None = None,
    need_h: bool = True,
    h_out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """h = prologue(x) and a = drop(h) D^T, the dropout's 1 / keep included.

    Args:
        x: one [M, K] tensor, two (gate, up) for swiglu.
        rstd: [M, 1] of rms_norm, used instead of computed.
        need_h: False where only a is wanted.
        h_out: [M, K], where h goes (columns of a wider buffer, say).

    Returns:
        h [M, K], which may be x itself; rstd [M, 1] of rms_norm, else None; a [M, R], None without `low_rank`.
    """
    h, rstd = _prologue_h(spec, x, rstd, out=h_out)
    a = None
    if low_rank is not None:
        down, mask = low_rank
        (kept,) = _dropped(mask, h)
        a = _scaled_mm(kept, down.to(h.dtype).t(), _inverse_keep(mask))
    return (h if need_h else None), rstd, a


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
) -> PrologueGrads:
    """Adds mask * (da D) / keep of every low-rank part to dh, then differentiates the prologue; each only where asked.

    Args:
        dh: [M, K], may be overwritten; None where only ddowns are wanted.
        x, rstd: as in `prologue`; x may be None where nothing needs it.
        low_rank: parts and their da [M, R].
        ddown_wanted: for each part whether its dD = da^T drop(h) [R, K] is wanted.
        is_in_dh: the low-rank parts are in dh already (`lowrank_gemm_dx`).
        dresidual: [M, K], added to dx (one input only).
        dx_out: where dx goes, one [M, K] an input (columns of one buffer, say).
    """
    h = activated = None
    if any(ddown_wanted):
        activated = torch.nn.functional.silu(x[0]) if spec.name == "swiglu" else None
        h, _ = _prologue_h(spec, x, rstd, activated)
    ddowns: list[Tensor | None] = []
    for ((down, mask), da), wanted in zip(low_rank, ddown_wanted, strict=True):
        operands = [h] if wanted else []
        if dh is not None and mask is not None and not is_in_dh:
            operands.append(_scaled_mm(da, down.to(dh.dtype), mask.inverse_keep))
        kept = list(_dropped(mask, *operands)) if operands else []
        ddowns.append(_scaled_mm(da.t(), kept[0], _inverse_keep(mask)).to(down.dtype) if wanted else None)
        if dh is None or is_in_dh:
            continue
        if mask is None:
            dh.addmm_(da, down.to(dh.dtype))
        else:
            dh.add_(kept[-1])
    if dh is None:
        return PrologueGrads((None,) * len(x), None, None, ddowns)
    dx, dgain, din_scale = _prologue_grads(
        spec, dh, x, rstd, activated, need_dx=need_dx, need_dgain=need_dgain, need_din_scale=need_din_scale
    )
    if dresidual is not None:
        dx = (dx[0].add_(dresidual),)
    if dx_out is not None:
        dx = tuple(None if part is None else out.copy_(part) for part, out in zip(dx, dx_out, strict=True))
    return PrologueGrads(dx, dgain, din_scale, ddowns)


def _prologue_grads(spec, dh, x, rstd, activated, *, need_dx, need_dgain, need_din_scale):
    """(dx, dgain, din_scale) from the whole dh, which may be overwritten."""
    if spec.name == "swiglu" and activated is None and (need_dx[1] or need_din_scale):
        activated = torch.nn.functional.silu(x[0])
    din_scale = None
    if spec.in_scale is not None:
        if need_din_scale:
            unscaled, _ = _prologue_h(spec._replace(in_scale=None), x, rstd, activated)
            din_scale = (dh * unscaled).sum(0, dtype=accumulate_dtype(dh.dtype)).to(spec.in_scale.dtype)
        dh = (dh * spec.in_scale).to(dh.dtype)
    if spec.name == "rms_norm":
        dx, dgain = rms_norm_backward(dh, x[0], spec.gain, rstd, need_dx=need_dx[0], need_dgain=need_dgain)
        return (dx,), dgain, din_scale
    if spec.name == "swiglu":
        dup = dh * activated if need_dx[1] else None
        dgate = torch.ops.aten.silu_backward(dh.mul_(x[1]), x[0]) if need_dx[0] else None
        return (dgate, dup), None, din_scale
    return (dh if need_dx[0] else None,), None, din_scale


def lowrank_gemm(
    x: Tensor, weight: Tensor, terms: Sequence[Term] = (), *, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x weight^T + bias + residual [M, N], the low-rank terms added to their columns.

    x: [M, K]; weight: [N, K] of x's dtype; bias: [N]; residual: [M, N].
    """
    if residual is not None and bias is None:
        y, residual = torch.addmm(residual, x, weight.t()), None
    elif bias is not None:
        y = torch.addmm(bias, x, weight.t())
    else:
        y = x @ weight.t()
    for term in terms:
        part = y if term.stop - term.start == y.shape[1] else y[:, term.start : term.stop]
        part.addmm_(term.z, term.up.to(y.dtype).t(), alpha=term.scaling)
    return y if residual is None else y.add_(residual)


def lowrank_gemm_dx(
    dy: Tensor, weight: Tensor, *, into: Tensor | None = None, low_rank: tuple[LowRank, Tensor] | None = None
) -> Tensor:
    """dy weight [M, K] of dy [M, N] and weight [N, K]; added to `into` in place where given.

    low_rank: a part and its da [M, R], whose mask * (da D) / keep is added; only where `adds_in_dx` says so.
    """
    dx = dy @ weight if into is None else into.addmm_(dy, weight)
    if low_rank is not None:
        (down, mask), da = low_rank
        if mask is None:
            dx.addmm_(da, down.to(dx.dtype))
        else:
            dx.add_(_dropped(mask, _scaled_mm(da, down.to(dx.dtype), mask.inverse_keep))[0])
    return dx


def adds_in_dx(dy: Tensor, num_in: int, low_rank: LowRank) -> bool:
    """Whether `lowrank_gemm_dx` of dy [M, N] to [M, num_in] is to add a low-rank part; else `prologue_backward` does,
    in a pass that it makes anyway."""
    return False


def dy_pass(
    dys: Sequence[Tensor],
    a: Sequence[Tensor],
    ups: Sequence[Tensor],
    *,
    scalings: Sequence[float],
    activations: Sequence[str],
    need_da: Sequence[bool],
    need_dup: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What branches `s f(a) U^T` need from the gradient of what they add to.

    For branch i: dys[i] [M, N_i], a[i] [M, R_i], ups[i] [N_i, R_i]; branches of one segment have the same dy.
    Returns da = s (dy U) * f'(a) [M, R_i] and dU = s dy^T f(a) [N_i, R_i] in U's dtype, each only where asked.
    """
    das, dups = [], []
    for dy, a_i, up, scaling, name, wants_da, wants_dup in zip(
        dys, a, ups, scalings, activations, need_da, need_dup, strict=True
    ):
        da = activation_backward(name, _scaled_mm(dy, up.to(dy.dtype), scaling), a_i) if wants_da else None
        das.append(da)
        z = ACTIVATIONS[name].function(a_i) if wants_dup else None
        dups.append(_scaled_mm(dy.t(), z, scaling).to(up.dtype) if wants_dup else None)
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
    """y + s f(a) U^T + residual [M, N], and a = drop(y) D^T [M, R]; down [R, N], up [N, R], any float dtype."""
    (kept,) = _dropped(mask, y)
    a = _scaled_mm(kept, down.to(y.dtype).t(), _inverse_keep(mask))
    z = ACTIVATIONS[activation].function(a)
    out = torch.addmm(y, z, up.to(y.dtype).t(), alpha=scaling)
    return (out if residual is None else out.add_(residual)), a


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))  # [B, T, heads, DH]


def _transform(x: Tensor, how: HeadTransform, cos, sin, head_dim: int, eps: float) -> Tensor:
    x = _heads(x if how.scale is None else (x * how.scale).to(x.dtype), head_dim)
    if how.gain is not None:
        x, _ = rms_norm_forward(x, how.gain, eps)
    return (x if cos is None else rotate(x, cos[..., None, :], sin[..., None, :])).transpose(1, 2)


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
    """q, k, v [B, T, heads * DH] scaled, normalised by head and rotated (not v), as [B, heads, T, DH]: transposed
    views of [B, T, heads, DH], so that attention lays its output out alike. overwrite: which of them take their
    result's place."""
    angles = ((rotation.cos_q, rotation.sin_q), (rotation.cos, rotation.sin), (None, None))
    results = []
    for x, transform, (cos, sin), in_place in zip((q, k, v), how, angles, overwrite, strict=True):
        done = _transform(x, transform, cos, sin, head_dim, eps)
        results.append(_heads(x, head_dim).transpose(1, 2).copy_(done) if in_place else done)
    return tuple(results)


def _transform_backward(dx, x, how, cos, sin, head_dim, eps, needs):
    need_x, need_scale, need_gain = needs
    if not any(needs):
        return None, None, None
    dx = dx.transpose(1, 2)
    if cos is not None:
        dx = rotate_backward(dx, cos[..., None, :], sin[..., None, :])
    dgain = dscale = None
    if how.gain is not None:
        scaled = _heads(x if how.scale is None else (x * how.scale).to(x.dtype), head_dim)
        _, rstd = rms_norm_forward(scaled, how.gain, eps)
        dx, dgain = rms_norm_backward(dx, scaled, how.gain, rstd, need_dx=need_x or need_scale, need_dgain=need_gain)
    if dx is not None:
        dx = dx.flatten(-2)
        if how.scale is not None:
            if need_scale:
                wide = accumulate_dtype(x.dtype)
                dscale = (dx.to(wide) * x.to(wide)).flatten(0, -2).sum(0).to(how.scale.dtype)
            dx = (dx * how.scale).to(dx.dtype) if need_x else None
    return dx, dscale, dgain


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
    """(dx [B, T, heads * DH], dscale, dgain) of q, k and v from gradients [B, heads, T, DH] of what `heads` returned.

    raw: `heads`' inputs; None where neither a scale is trained nor a gain is there. needs: (dx, dscale, dgain) each.
    out: where dx goes, one [B, T, heads * DH] each (columns of one buffer, say).
    """
    rotations = ((rotation.cos_q, rotation.sin_q), (rotation.cos, rotation.sin), (None, None))
    results = []
    for i, (dx, x, transform, (cos, sin), need) in enumerate(zip(grads, raw, how, rotations, needs, strict=True)):
        dx, dscale, dgain = _transform_backward(dx, x, transform, cos, sin, head_dim, eps, need)
        if out is not None and dx is not None:
            dx = out[i].copy_(dx)
        results.append((dx, dscale, dgain))
    return results


def _prefix_scores(q: Tensor, prefix_k: Tensor, scale: float) -> Tensor:
    """[B, HK, G, T, P] in the accumulation dtype, G query heads to a key/value head."""
    grouped = q.unflatten(1, (prefix_k.shape[0], -1))
    return torch.einsum("bkgtd,kpd->bkgtp", grouped, prefix_k.to(q.dtype)).to(accumulate_dtype(q.dtype)) * scale


def merge_prefix(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor, *, scale: float, alive: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, DH] and lse [B, H, >= T] of the softmax over the prefix and the main part, from the main part's.

    Args:
        q: [B, H, T, DH]; prefix_k, prefix_v: [HK, P, DH], any float dtype.
        out, lse: of the main part; may be overwritten. lse may be padded beyond T.
        alive: [B or 1, 1, T] bool, False for queries whose main part attends to nothing: their lse is arbitrary.
    """
    num_queries = q.shape[2]
    scores = _prefix_scores(q, prefix_k, scale)
    lse_prefix = torch.logsumexp(scores, dim=-1).flatten(1, 2)  # [B, H, T]
    out_main, lse_main = out, lse[..., :num_queries]
    if alive is not None:
        lse_main = lse_main.masked_fill(~alive, float("-inf"))
        out_main = out_main.masked_fill(~alive[..., None], 0.0)
    merged = torch.logaddexp(lse_main, lse_prefix.to(lse_main.dtype))
    weights = torch.exp(scores - merged.unflatten(1, (prefix_k.shape[0], -1))[..., None].to(scores.dtype))
    from_prefix = torch.einsum("bkgtp,kpd->bkgtd", weights.to(q.dtype), prefix_v.to(q.dtype)).flatten(1, 2)
    result = torch.empty_like(out)  # out's layout
    torch.addcmul(from_prefix, out_main, torch.exp(lse_main - merged)[..., None].to(q.dtype), out=result)
    if lse.shape[-1] != num_queries:  # the efficient CUDA kernel pads its lse
        merged = torch.cat((merged, lse[..., num_queries:]), dim=-1)
    return result, merged


def prefix_backward(
    dout: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, H, T, DH] with the prefix part added, and dK_p, dV_p [HK, P, DH] in the prefix's dtype, reduced over
    batch, group and queries. out and lse are the merged ones; dq may be overwritten."""
    kv_heads, dtype = prefix_k.shape[0], q.dtype
    scores = _prefix_scores(q, prefix_k, scale)
    wide = scores.dtype
    weights = torch.exp(scores - lse[..., : q.shape[2]].unflatten(1, (kv_heads, -1))[..., None].to(wide))
    grouped_dout = dout.unflatten(1, (kv_heads, -1))
    delta = (dout.to(wide) * out.to(wide)).sum(-1).unflatten(1, (kv_heads, -1))
    dweights = torch.einsum("bkgtd,kpd->bkgtp", grouped_dout, prefix_v.to(dtype)).to(wide)
    dscores = (weights * (dweights - delta[..., None]) * scale).to(dtype)
    dq_prefix = torch.einsum("bkgtp,kpd->bkgtd", dscores, prefix_k.to(dtype)).flatten(1, 2)
    dprefix_k = torch.einsum("bkgtp,bkgtd->kpd", dscores, q.unflatten(1, (kv_heads, -1)))
    dprefix_v = torch.einsum("bkgtp,bkgtd->kpd", weights.to(dtype), grouped_dout)
    return dq + dq_prefix, dprefix_k.to(prefix_k.dtype), dprefix_v.to(prefix_v.dtype)


def cross_entropy_(logits: Tensor, labels: Tensor, count: Tensor, *, need_grad: bool) -> Tensor:
    """sum_i (logsumexp(logits_i) - logits_i[label_i]) / count, 0-dim in the accumulation dtype.

    logits: [S, V], overwritten by their gradient where `need_grad`; labels: [S] int64, rows with -100 are ignored;
    count: 0-dim tensor.
    """
    wide = accumulate_dtype(logits.dtype)
    kept = labels != IGNORE_INDEX
    index = labels.masked_fill(~kept, 0)[:, None]
    scores = logits.to(wide)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    total = (lse - scores.gather(1, index)).squeeze(1).masked_fill(~kept, 0.0).sum()
    if need_grad:
        dlogits = torch.exp(scores - lse) if scores is logits else scores.sub_(lse).exp_()
        dlogits.scatter_add_(1, index, torch.full_like(index, -1, dtype=wide))
        # A count of 0, with every row ignored, is no nan.
        dlogits.mul_((kept.to(wide) / count).masked_fill_(~kept, 0.0)[:, None])
        logits.copy_(dlogits)
    return total / count
