"""Training steps in several processes; started by torchrun from tests/test_distributed.py.

argv: the file that rank 0 writes, losses and trained parameters by "how is_fused".
"""

import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mmpeft_fast import fuse
from mmpeft_fast.layers.decoder import FusedDecoderLayer
from tests.tiny_models import randomize_trainable, tiny_batch, tiny_model


def prepared_model(is_fused: bool):
    targets = r".*layers.*\.(q|v|o|up|down)_proj"
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    randomize_trainable(model)
    return (fuse(model, strict=True) if is_fused else model).train()


def whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).flatten()


def train(how: str, is_fused: bool, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Three steps; the mean losses and the trained parameters."""
    model = prepared_model(is_fused)
    if how == "fsdp2":  # `prepare` would come here itself on GPUs
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        model = fsdp2_prepare_model(accelerator, model)
        assert isinstance(model.get_base_model().model.layers[0], FSDPModule)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if how == "ddp":
        model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(3):
        # Different numbers of rows and labels in the processes.
        batch = tiny_batch("llama", batch_size=2 + accelerator.process_index, seed=2 * step + accelerator.process_index)
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean"))
    trained = torch.cat([whole(parameter) for parameter in model.parameters() if parameter.requires_grad])
    unfused = [layer for layer in model.modules() if isinstance(layer, FusedDecoderLayer) and hasattr(layer, "said")]
    assert not unfused, "fused layers ran their own forward"
    return {"losses": torch.stack(losses), "trained": trained}


def main(output: str) -> None:
    accelerator = Accelerator(cpu=True)
    results = {f"{how} {fused}": train(how, fused, accelerator) for how in ("ddp", "fsdp2") for fused in (False, True)}
    results["start"] = torch.cat([whole(p) for p in prepared_model(False).parameters() if p.requires_grad])
    if accelerator.is_main_process:
        torch.save(results, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
