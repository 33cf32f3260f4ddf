"""Two processes: DDP through Accelerate, and FSDP2."""

import os
import subprocess
import sys

import pytest
import torch

from tests.test_layering import ROOT


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("distributed") / "results.pt"
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.distributed_steps", str(output),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_the_same_training_in_two_processes(results, how):
    fused, eager = results[f"{how} True"], results[f"{how} False"]
    torch.testing.assert_close(fused["losses"], eager["losses"])
    torch.testing.assert_close(fused["trained"], eager["trained"])
    assert not torch.allclose(eager["trained"], results["start"], atol=1e-3)


def test_sharded_and_replicated_training_agree(results):
    torch.testing.assert_close(results["fsdp2 True"]["trained"], results["ddp True"]["trained"])
