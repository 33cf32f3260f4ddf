"""What the kernels need on a GPU, compiled without one, and the table that records it."""

import pytest
import triton
from mmpeft_kernels.aot import compile_launch, faults, read_table
from mmpeft_kernels.launches import record_launches

TABLE = read_table()
LAUNCHES, RESOURCES = TABLE["launches"], TABLE["resources"]
# A case of every kernel; `python -m mmpeft_kernels.aot check` compiles all.
COMPILED = (
    "sm_80 float16 lowrank_gemm dx",
    "sm_90 bfloat16 lowrank_gemm forward r16",
    "sm_100 bfloat16 lowrank_gemm forward residual",
    "sm_90 bfloat16 prologue rms_norm r192",
    "sm_80 bfloat16 prologue_backward swiglu",
    "sm_90 float16 dy_pass r64 tanh",
    "sm_80 bfloat16 ddown swiglu",
    "sm_90 float32 rotary_backward ia3",
    "sm_90 bfloat16 prefix_backward",
    "sm_80 float16 post_adapter r64",
    "sm_90 bfloat16 cross_entropy",
    "gfx942 bfloat16 lowrank_gemm forward r16",
    "sm_90 bfloat16 lowrank_gemm gluon forward r16",
)
pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing compiles")


def test_the_table_lists_the_launches_of_the_launchers():
    recorded = record_launches()
    assert recorded.keys() == LAUNCHES.keys(), "run: python -m mmpeft_kernels.aot launches"
    changed = [name for name, launch in recorded.items() if launch != LAUNCHES[name]]
    assert not changed, f"{changed} differ; run: python -m mmpeft_kernels.aot launches, then compile"


@pytest.mark.parametrize("version", sorted(RESOURCES))
def test_every_launch_of_the_table_is_fit_for_its_device(version):
    assert RESOURCES[version].keys() == LAUNCHES.keys()
    found = {name: faults(LAUNCHES[name], row) for name, row in RESOURCES[version].items()}
    assert not {name: fault for name, fault in found.items() if fault}
    for name, row in RESOURCES[version].items():
        if LAUNCHES[name]["kernel"].endswith(":_lowrank_gemm_kernel") and "float32" not in name:
            arch = LAUNCHES[name]["arch"]
            kind = {80: "mma", 90: "wgmma", 100: "tcgen05", "gfx942": "mfma"}[arch]
            assert row["matrix_instructions"] == kind, name
            assert row["tma"] == (arch in (90, 100) and "pointers" not in name), name


def test_a_fault_is_found():
    launch = {"arch": 80, "constants": {"USE_TMA": True}}
    sound = {"registers": 32, "spilled_bytes": 0, "shared_bytes": 163 * 1024, "matrix_instructions": "mma", "tma": True}
    assert faults(launch, sound) == []
    assert faults(launch, sound | {"spilled_bytes": 8}) == ["spills 8 bytes a thread"]
    assert len(faults(launch, sound | {"shared_bytes": 163 * 1024 + 1, "tma": False})) == 2


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_what_the_table_says(name):
    resources = compile_launch(LAUNCHES[name])
    assert not faults(LAUNCHES[name], resources)
    if triton.__version__ in RESOURCES:  # registers and shared memory differ from one compiler to the next
        assert resources == RESOURCES[triton.__version__][name]
