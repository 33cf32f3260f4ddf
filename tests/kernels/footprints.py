"""The footprint and tile of a recorded launch, read from what would be compiled, not from what the launcher said."""

from mmpeft_kernels.lowrank_gemm import GemmTile
from mmpeft_kernels.shared_memory import FORMULAS, Footprint
from mmpeft_kernels.tile import Tile

_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
# Parameter by whose dtype a kernel's operands go.
_OPERAND = {
    "shrink": "h_ptr", "prologue_backward": "dh_ptr", "ddown": "x_ptr", "dy_pass": "dy_ptr", "post_adapter": "y_ptr",
    "prefix": "q_ptr", "prefix_backward": "q_ptr", "lowrank_gemm": "x", "lowrank_gemm_gluon": "x",
}  # fmt: skip
# Kernels that read an adapter's matrix, by its parameter.
_READS = {
    "down_ptr": ("shrink", "prologue_backward", "post_adapter"),
    "up_ptr": ("post_adapter",),
    "u_ptr": ("dy_pass", "lowrank_gemm"),
}


def footprint_of(launch: dict) -> tuple[Footprint, Tile] | None:
    """None for kernels that keep next to nothing in shared memory."""
    module, function = launch["kernel"].split(":")
    kernel = module if module == "lowrank_gemm_gluon" else function.strip("_").removesuffix("_kernel")
    if kernel not in FORMULAS:
        return None
    constants, signature, options = launch["constants"], launch["signature"], launch["options"]
    itemsize = _ITEMSIZE[_dtype(signature[_OPERAND[kernel]])]
    warps_and_stages = {"num_warps": options["num_warps"], "num_stages": options["num_stages"]}
    footprint = Footprint(kernel, launch["arch"], itemsize)
    if kernel == "lowrank_gemm_gluon":
        block_m, block_n, block_k = (*_block(signature["out"]), _block(signature["x"])[1])
        return footprint, GemmTile(block_m=block_m, block_n=block_n, block_k=block_k, use_tma=True, **warps_and_stages)
    sizes = {"block_m": constants["BLOCK_M"]}
    adapters = [signature[name] for name in ("down_ptr", "up_ptr", "u_ptr") if kernel in _READS.get(name, ())]
    wide = any(_ITEMSIZE.get(_dtype(adapter), 0) > itemsize for adapter in adapters)
    footprint = footprint._replace(wide=wide)
    if kernel == "lowrank_gemm":
        sizes |= {"block_n": constants["BLOCK_N"], "block_k": constants["BLOCK_K"], "use_tma": constants["USE_TMA"]}
        return footprint, GemmTile(**sizes, **warps_and_stages)
    if kernel.startswith("prefix"):
        return footprint._replace(block_r=constants["BLOCK_DH"]), Tile(
            block_n=constants["BLOCK_P"], **sizes, **warps_and_stages
        )
    has_branch = constants.get("down_ptr", 0) is not None and constants.get("da_ptr", 0) is not None
    footprint = footprint._replace(
        block_r=constants["BLOCK_R"] if has_branch else 0, prologue=constants.get("PROLOGUE", "none")
    )
    block_n = constants["BLOCK_N"] if "BLOCK_N" in constants else constants["BLOCK_K"]
    return footprint, Tile(block_n=block_n, **sizes, **warps_and_stages)


def _dtype(signature: str) -> str:
    """Of "*bf16" and "tensordesc<bf16[128,64],...>"."""
    return signature.removeprefix("*").removeprefix("tensordesc<").split("[")[0]


def _block(signature: str) -> tuple[int, int]:
    rows, columns = signature.split("[")[1].split("]")[0].split(",")
    return int(rows), int(columns)
