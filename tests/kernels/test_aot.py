"""What the kernels need on a GPU, compiled without one, and the table that records it."""

import json

import pytest
import triton
from mmpeft_kernels.aot import compile_launch, faults, read_table
from mmpeft_kernels.launches import record_launches
from mmpeft_kernels.shared_memory import LIMITS

from tests.kernels.footprints import footprint_of

TABLE = read_table()
LAUNCHES, RESOURCES = TABLE["launches"], TABLE["resources"]
# A case of every kernel; `python -m mmpeft_kernels.aot check` compiles all.
COMPILED = (
    "sm_80 bfloat16 lowrank_gemm dx pointers",
    "sm_90 bfloat16 lowrank_gemm forward tma r16 x3",
    "sm_100 bfloat16 lowrank_gemm forward tma residual",
    "sm_90 bfloat16 prologue_backward swiglu r64",
    "sm_90 float16 ddown none r128",
    "sm_80 float32 rotary_backward ia3",
    "sm_90 bfloat16 prefix_backward",
    "sm_90 float16 post_adapter r64",
    "sm_90 bfloat16 cross_entropy",
    "gfx942 bfloat16 lowrank_gemm forward pointers r16 x3",
    "sm_90 bfloat16 lowrank_gemm gluon forward r8 x3",
    "sm_90 bfloat16 lowrank_gemm dx tma r64 dropout",
    "sm_90 bfloat16 prologue rms_norm r192 _shrink_kernel",
)
# Beside them, as many as this of the launches whose shared memory comes nearest to their device's limit.
NEAREST = 6
pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing compiles")


def nearest_to_the_limit() -> list[str]:
    """The launches that no two of have one kernel and architecture, by the arithmetic."""

    def room(name):
        footprint, tile = footprint_of(LAUNCHES[name])
        return footprint.bytes(tile) / LIMITS[footprint.arch]

    largest = {}
    for name in sorted((name for name in LAUNCHES if footprint_of(LAUNCHES[name])), key=room):
        largest[LAUNCHES[name]["kernel"], LAUNCHES[name]["arch"]] = name
    return sorted(largest.values(), key=room)[-NEAREST:]


@pytest.fixture(scope="module")
def recorded():
    return record_launches()


def test_the_table_lists_the_launches_of_the_launchers(recorded):
    """And of the tiles that committed tables name."""
    listed = {name for name in LAUNCHES if " tile " not in name}
    assert {name for name in recorded if " tile " not in name} == listed, "run: python -m mmpeft_kernels.aot launches"
    assert recorded.keys() <= LAUNCHES.keys(), "a table has new tiles; run: python -m mmpeft_kernels.aot launches"
    changed = [name for name, launch in recorded.items() if launch != LAUNCHES[name]]
    assert not changed, f"{changed} differ; run: python -m mmpeft_kernels.aot launches, then compile"


def test_the_tiles_of_tables_are_listed(tmp_path, recorded):
    """Every tile at its rank, under U of both dtypes, smaller where an architecture cannot hold it."""
    fields = {"block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 3}
    gemm = {**fields, "block_k": 64, "use_tma": True}
    tiles = {
        "dy_pass": {"bf16 m4096 n4096 r128": fields}, "shrink": {"bf16 m4096 k4096 r32": fields},
        "masked_dx": {"bf16 m4096 n4096 k4096 r32": gemm},
        "lowrank_gemm fwd": {"bf16 m4096 n4096 k4096 r128": gemm}, "lowrank_gemm dx": {"fp16 m8 n8 k8 r1": gemm},
    }  # fmt: skip
    (tmp_path / "some-gpu.json").write_text(json.dumps({"device": "some GPU", "source": "", "tiles": tiles}))
    listed = record_launches(tmp_path)
    added = {name: launch for name, launch in listed.items() if " tile 128 128 8 3" in name}
    assert {name: launch for name, launch in listed.items() if name not in added}.keys() == {
        name for name in recorded if " tile " not in name
    }
    kernels = {launch["kernel"].split(":")[0] for launch in added.values()}
    assert kernels == {"dy_pass", "shrink", "lowrank_gemm", "lowrank_gemm_gluon"}
    assert {launch["arch"] for launch in added.values()} == {90}
    for name, launch in added.items():
        footprint, tile = footprint_of(launch)
        assert footprint.bytes(tile) <= min(LIMITS[arch] for arch in (launch["arch"], *launch["also"])), name
    del tiles["lowrank_gemm fwd"], tiles["lowrank_gemm dx"], tiles["masked_dx"]
    (tmp_path / "some-gpu.json").write_text(json.dumps({"device": "", "architecture": 86, "tiles": tiles}))
    assert {launch["arch"] for name, launch in record_launches(tmp_path).items() if " tile " in name} == {86}


@pytest.mark.parametrize("version", sorted(RESOURCES))
def test_every_launch_of_the_table_is_fit_for_its_device(version):
    assert RESOURCES[version].keys() == LAUNCHES.keys()
    found = {name: faults(LAUNCHES[name], row) for name, row in RESOURCES[version].items()}
    assert not {name: fault for name, fault in found.items() if fault}
    for name, row in RESOURCES[version].items():
        if LAUNCHES[name]["kernel"].endswith(":_lowrank_gemm_kernel") and "float32" not in name:
            arch = LAUNCHES[name]["arch"]
            kind = {80: "mma", 86: "mma", 90: "wgmma", 100: "tcgen05", "gfx942": "mfma"}[arch]
            assert row["matrix_instructions"] == kind, name
            assert row["tma"] == any(word in name for word in (" tma", " gluon ", " tile ")), name


def test_a_fault_is_found():
    launch = {"arch": 80, "also": [], "constants": {"USE_TMA": True}}
    sound = {"registers": 32, "spilled_bytes": 0, "shared_bytes": 163 * 1024, "matrix_instructions": "mma", "tma": True}
    assert faults(launch, sound) == []
    assert faults(launch, sound | {"spilled_bytes": 8}) == ["spills 8 bytes a thread"]
    assert len(faults(launch, sound | {"shared_bytes": 163 * 1024 + 1, "tma": False})) == 2
    found = faults(launch | {"also": [86]}, sound)
    assert found == [f"{163 * 1024} bytes of shared memory, limit {99 * 1024} on 86"]


@pytest.mark.parametrize("name", dict.fromkeys((*COMPILED, *nearest_to_the_limit())))
def test_compiles_to_what_the_table_says(name):
    resources = compile_launch(LAUNCHES[name])
    assert not faults(LAUNCHES[name], resources)
    if triton.__version__ in RESOURCES:  # registers and shared memory differ from one compiler to the next
        assert resources == RESOURCES[triton.__version__][name]
