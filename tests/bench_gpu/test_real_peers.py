"""Real peers: what is said where they are missing, and what is done with their wheels where they are there."""

import subprocess
import sys
import zipfile
from pathlib import Path

from bench.gpu import real_peers
from bench.gpu.repository import ROOT
from bench.gpu.shapes import DRY, GPU

LIGER = """
done = []
def apply_liger_kernel_to_llama(**options): done.append(("llama", options))
def apply_liger_kernel_to_qwen2(**options): done.append(("qwen2", options))
"""


def in_a_process(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_peers_have_the_settings_of_our_steps():
    items = real_peers.items(Path("wheels"), GPU)
    assert {item["setting"] for item in items} == set(GPU.text)
    assert {item["implementation"] for item in items} == {"triton", "frozen", "peft_bf16", "liger", "unsloth"}
    for scope in (GPU, DRY):  # nothing to compare ours with
        assert {item["implementation"] for item in real_peers.items(None, scope)} == set(real_peers.NAMES)


def test_missing_wheels_are_a_row(tmp_path):
    for name, (package, *_) in real_peers.NAMES.items():
        (row,) = real_peers.run("tiny llama text", name, "fp32", "cpu", str(tmp_path))
        assert row["implementation"] == name and row["not_run"].startswith(package)
        assert tmp_path.name in row["not_run"] and str(tmp_path.parent) not in row["not_run"]
    (row,) = real_peers.run("tiny llama text", "liger", "fp32", "cpu", None)
    assert "--wheels (not given)" in row["not_run"]


def test_a_wheel_is_unpacked_and_replaces_what_it_replaces(tmp_path):
    with zipfile.ZipFile(tmp_path / "liger_kernel-9.9.whl", "w") as wheel:
        wheel.writestr("liger_kernel/__init__.py", "")
        wheel.writestr("liger_kernel/transformers.py", LIGER)
        wheel.writestr(
            "liger_kernel-9.9.dist-info/METADATA", "Metadata-Version: 2.1\nName: liger-kernel\nVersion: 9.9\n"
        )
    code = f"""
from pathlib import Path
from bench.gpu import real_peers
rows = list(real_peers.run("tiny llama text", "liger", "fp32", "cpu", {str(tmp_path)!r}))
import sys
print([name for name, options in sys.modules["liger_kernel.transformers"].done if options["swiglu"]])
print(rows[0]["label"], rows[0]["implementation"], rows[0]["p50_ms"] > 0, rows[1]["saved_mib"] > 0)
"""
    assert in_a_process(code).split("\n")[:2] == ["['llama', 'qwen2']", "liger-kernel 9.9 liger True True"]


def test_stand_ins_are_importable_by_any_name_and_have_versions(tmp_path):
    code = f"""
import importlib.metadata
from pathlib import Path
from bench.gpu import real_peers
real_peers._STAND_INS.clear()
real_peers._STAND_INS["not_a_package"] = "4.3.0"
real_peers._stand_in(Path({str(tmp_path)!r}))
from not_a_package.deep.inside import Anything
import not_a_package
print(isinstance(Anything, type), not_a_package.__version__, importlib.metadata.version("not_a_package"))
import json
print(hasattr(not_a_package, "__wrapped__"))
"""
    assert in_a_process(code) == "True 4.3.0 4.3.0\nFalse\n"
