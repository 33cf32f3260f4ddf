"""The low-rank GEMM for Hopper (sm_90), warp-specialised in Gluon: out = (s z U + x W (+ bias)) (* scale) (+ residual).

One warp feeds a ring of shared-memory stages by TMA, two warpgroups multiply them (wgmma) into one accumulator. The
low-rank steps are steps of the ring whose copies come from the descriptors of z and U. The residual's tile arrives
while the product runs. The same formula, operands and tiles as `lowrank_gemm`.
"""

from collections.abc import Sequence

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mmpeft_kernels import lowrank_gemm as plain
from mmpeft_kernels.launch import fitted, launch
from mmpeft_kernels.lowrank_gemm import GROUP_M, GemmTile
from mmpeft_kernels.row_chunks import num_multiprocessors
from mmpeft_kernels.segments import SegmentShape, check_segments, column_tiles
from mmpeft_kernels.shared_memory import Footprint
from mmpeft_kernels.tile import architecture, cdiv

# Triton 3.9 names the copies anew.
_async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

DEFAULT_TILE = GemmTile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3, use_tma=True)
_PRODUCER_WARPS, _PRODUCER_REGISTERS = gl.constexpr(1), gl.constexpr(24)


@gluon.jit
def _place_of(tile_idx, tiles_ptr, num_tiles_m, num_tiles_n, BLOCK_M: gl.constexpr, GROUP_M: gl.constexpr):
    """First row, first and end column, first and end rank of an output tile; as in `lowrank_gemm`."""
    num_in_group = GROUP_M * num_tiles_n
    first_m = tile_idx // num_in_group * GROUP_M
    group_rows = gl.minimum(num_tiles_m - first_m, GROUP_M)
    row = (first_m + tile_idx % num_in_group % group_rows) * BLOCK_M
    entry = tiles_ptr + tile_idx % num_in_group // group_rows * 4
    return row, gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def _fill(a_desc, b_desc, a_row, a_col, b_row, b_col, step, a_ring, b_ring, ready, empty):
    """Copies one step's operands into its stage of the ring, once the consumer has left it."""
    num_stages: gl.constexpr = a_ring.shape[0]
    stage = step % num_stages
    mbarrier.wait(empty.index(stage), (step // num_stages & 1) ^ 1)
    barrier = ready.index(stage)
    mbarrier.expect(barrier, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
    _async_load(a_desc, [a_row, a_col], barrier, a_ring.index(stage))
    _async_load(b_desc, [b_row, b_col], barrier, b_ring.index(stage))


@gluon.jit
def _produce(
    x, w, z, u, tiles_ptr, a_ring, b_ring, ready, empty, num_tiles_m, num_tiles_n, K,
    HAS_LOW_RANK: gl.constexpr, TRANSPOSED: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = x.block_type.shape[0]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    step = 0
    for tile_idx in range(gl.program_id(0), num_tiles_m * num_tiles_n, gl.num_programs(0)):
        row, col, _, first_rank, end_rank = _place_of(tile_idx, tiles_ptr, num_tiles_m, num_tiles_n, BLOCK_M, GROUP_M)
        if HAS_LOW_RANK:
            for r in range(0, end_rank - first_rank, BLOCK_K):
                if TRANSPOSED:
                    _fill(z, u, row, first_rank + r, col, r, step, a_ring, b_ring, ready, empty)
                else:
                    _fill(z, u, row, first_rank + r, first_rank + r, col, step, a_ring, b_ring, ready, empty)
                step += 1
        for k in range(0, K, BLOCK_K):
            if TRANSPOSED:
                _fill(x, w, row, k, col, k, step, a_ring, b_ring, ready, empty)
            else:
                _fill(x, w, row, k, k, col, step, a_ring, b_ring, ready, empty)
            step += 1


@gluon.jit
def _multiply(acc, step, num_steps, a_ring, b_ring, ready, empty, TRANSPOSED: gl.constexpr):
    """acc plus the products of the next `num_steps` stages; each stage is given back when its product is done."""
    num_stages: gl.constexpr = a_ring.shape[0]
    for i in range(num_steps):
        stage = step % num_stages
        mbarrier.wait(ready.index(stage), step // num_stages & 1)
        b = b_ring.index(stage)
        if TRANSPOSED:
            b = b.permute((1, 0))
        acc = warpgroup_mma(a_ring.index(stage), b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((step + num_stages - 1) % num_stages), pred=i > 0)
        step += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + num_stages - 1) % num_stages), pred=num_steps > 0)
    return acc, step


@gluon.jit
def _columns(ptr, col, end_col, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """A vector's values for the columns of a tile, as a float32 row beside its accumulator."""
    # One load a thread, spread through shared memory: addresses for every thread's own columns would spill.
    offs_n = col + gl.arange(0, BLOCK_N, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    values = gl.load(ptr + offs_n, mask=offs_n < end_col, other=0.0)
    return gl.convert_layout(values, gl.SliceLayout(0, layout)).to(gl.float32)[None, :]


@gluon.jit
def _consume(
    bias_ptr, scale_ptr, residual, out, tiles_ptr, a_ring, b_ring, ready, empty, staging, residual_ready,
    num_tiles_m, num_tiles_n, K, scaling, HAS_LOW_RANK: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, TRANSPOSED: gl.constexpr, GROUP_M: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = out.block_type.shape[0]
    BLOCK_N: gl.constexpr = out.block_type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    step = 0
    tile_phase = 0
    for tile_idx in range(gl.program_id(0), num_tiles_m * num_tiles_n, gl.num_programs(0)):
        row, col, end_col, first_rank, end_rank = _place_of(
            tile_idx, tiles_ptr, num_tiles_m, num_tiles_n, BLOCK_M, GROUP_M
        )
        # The copy of the last tile's result must have left the staging buffer before anything else enters it.
        if HAS_RESIDUAL:
            tma.store_wait(0)
            mbarrier.expect(residual_ready, residual.block_type.nbytes)
            _async_load(residual, [row, col], residual_ready, staging)
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
        if HAS_LOW_RANK:
            num_steps = (end_rank - first_rank + BLOCK_K - 1) // BLOCK_K
            acc, step = _multiply(acc, step, num_steps, a_ring, b_ring, ready, empty, TRANSPOSED)
            acc *= scaling
        # The bias enters before the product: beside the accumulator and the scale its registers would spill.
        if HAS_BIAS:
            acc += _columns(bias_ptr, col, end_col, BLOCK_N, layout)
        acc, step = _multiply(acc, step, (K + BLOCK_K - 1) // BLOCK_K, a_ring, b_ring, ready, empty, TRANSPOSED)
        if HAS_SCALE:
            acc *= _columns(scale_ptr, col, end_col, BLOCK_N, layout)
        if HAS_RESIDUAL:
            mbarrier.wait(residual_ready, tile_phase)
            tile_phase ^= 1
            acc += staging.load(layout).to(gl.float32)
        else:
            tma.store_wait(0)
        staging.store(acc.to(out.dtype))
        fence_async_shared()
        _async_store(out, [row, col], staging)
    tma.store_wait(0)


@gluon.jit
def _lowrank_gemm_kernel(
    x, w, z, u, bias_ptr, scale_ptr, residual, out, tiles_ptr, M, K, num_tiles_n, scaling,
    HAS_LOW_RANK: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    TRANSPOSED: gl.constexpr, GROUP_M: gl.constexpr, NUM_STAGES: gl.constexpr,
):  # fmt: skip
    num_tiles_m = (M + out.block_type.shape[0] - 1) // out.block_type.shape[0]
    a_ring = gl.allocate_shared_memory(x.dtype, [NUM_STAGES, x.block_type.shape[0], x.block_type.shape[1]], x.layout)
    b_ring = gl.allocate_shared_memory(w.dtype, [NUM_STAGES, w.block_type.shape[0], w.block_type.shape[1]], w.layout)
    staging = gl.allocate_shared_memory(out.dtype, out.block_type.shape, out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    residual_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    mbarrier.init(residual_ready, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                bias_ptr, scale_ptr, residual, out, tiles_ptr, a_ring, b_ring, ready, empty, staging, residual_ready,
                num_tiles_m, num_tiles_n, K, scaling, HAS_LOW_RANK, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, TRANSPOSED,
                GROUP_M, x.block_type.shape[1],
            )),
            (_produce, (
                x, w, z, u, tiles_ptr, a_ring, b_ring, ready, empty, num_tiles_m, num_tiles_n, K,
                HAS_LOW_RANK, TRANSPOSED, GROUP_M,
            )),
        ],
        [_PRODUCER_WARPS],
        [_PRODUCER_REGISTERS],
    )  # fmt: skip


def lowrank_gemm(
    x, weight, *, tile: GemmTile = DEFAULT_TILE, z=None, u=None, scaling=1.0,
    segments: Sequence[SegmentShape] | None = None, transposed=True, bias=None, scale=None, residual=None, out=None,
    num_programs: int | None = None,
):  # fmt: skip
    """As `lowrank_gemm.lowrank_gemm`, in bfloat16 or float16, with z and u in x's dtype and fit for TMA too.

    Raises:
        ValueError: segments do not make up the shapes, a matrix or segment that TMA cannot take, other dtypes, stacked
            segments whose ranks are neither 0 nor u's width, or scale and residual together.
    """
    num_rows, depth = x.shape
    num_out = weight.shape[0] if transposed else weight.shape[1]
    rank = 0 if z is None else z.shape[1]
    segments = tuple(segments or (SegmentShape(num_out, rank),))
    check_segments("lowrank_gemm", segments, num_out, rank)
    _check_operands(segments, transposed, x, weight, z, u, rank)
    if scale is not None and residual is not None:  # a few bytes more than the registers hold
        raise ValueError("lowrank_gemm: expected a scale or a residual, got both")
    out = x.new_empty(num_rows, num_out) if out is None else out
    if not out.numel():
        return out
    operands = {"x": x, "weight": weight, "out": out} | ({} if residual is None else {"residual": residual})
    operands |= {"z": z, "u": u} if rank else {}

    def attempt(tile: GemmTile) -> None:
        plain.check_tma(tile, segments, **operands)
        a_block = [tile.block_m, tile.block_k]
        b_block = [tile.block_n, tile.block_k] if transposed else [tile.block_k, tile.block_n]
        x_desc, w_desc = _descriptor(x, a_block), _descriptor(weight, b_block)
        out_desc = _descriptor(out, [tile.block_m, tile.block_n])
        tiles = column_tiles(segments, tile.block_n, x.device)
        num_tiles = cdiv(num_rows, tile.block_m) * tiles.shape[0]
        # Operands that a flag switches off are given as others of their type: partitions take no None.
        launch(
            _lowrank_gemm_kernel, (min(num_tiles, num_programs or num_multiprocessors(x.device)),), x.device,
            x_desc, w_desc, _descriptor(z, a_block) if rank else x_desc, _descriptor(u, b_block) if rank else w_desc,
            tiles if bias is None else bias, tiles if scale is None else scale,
            out_desc if residual is None else _descriptor(residual, [tile.block_m, tile.block_n]), out_desc, tiles,
            num_rows, depth, tiles.shape[0], scaling,
            HAS_LOW_RANK=rank > 0, HAS_BIAS=bias is not None, HAS_SCALE=scale is not None,
            HAS_RESIDUAL=residual is not None, TRANSPOSED=transposed, GROUP_M=GROUP_M, NUM_STAGES=tile.num_stages,
            **tile.options,
        )  # fmt: skip

    fitted(Footprint("lowrank_gemm_gluon", architecture(x.device), x.element_size()), tile, x.device, attempt)
    return out


def _check_operands(segments: tuple[SegmentShape, ...], transposed: bool, x, weight, z, u, rank: int) -> None:
    if not transposed and len(segments) > 1:
        raise ValueError(f"lowrank_gemm: expected one segment with transposed=False, got {len(segments)}")
    dtypes = {str(part.dtype).removeprefix("torch.") for part in (x, weight, *((z, u) if rank else ()))}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        raise ValueError(f"lowrank_gemm: expected x, weight, z and u all bfloat16 or all float16, got {sorted(dtypes)}")
    width = u.shape[1 if transposed else 0] if rank else 0
    ranks = [segment.rank for segment in segments]
    # A TMA block cannot end where a segment's ranks do: what lies beyond must be what TMA reads as 0 in u.
    if any(part not in (0, width) for part in ranks):
        raise ValueError(f"lowrank_gemm: expected ranks of 0 or u's width {width} for TMA, got {ranks}")


def _descriptor(matrix, block):
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, block, gl.NVMMASharedLayout(128, 16, 2))
