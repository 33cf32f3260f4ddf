"""Host time of a decoder layer, forward and backward: what a GPU waits for where its kernels are shorter.

    python -m bench.host [--json] [--out results/bench/host.jsonl]

No GPU is needed. Every implementation runs on tiny CPU tensors, so that arithmetic does not count, as it would on a GPU
of this name: the fused layers on the Triton provider with the table of that GPU, Triton's launch path up to the
driver's call, which is a stub, as is the compiler. Library calls are those of a CPU. The time is that of the thread, of
a layer between models of few and of more layers, the least of many rounds.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.rows import append_rows, environment
from mmpeft_fast import LoRA, fuse
from mmpeft_fast.ops import dispatch, tape
from mmpeft_fast.ops.providers import provider
from mmpeft_fast.stored.baseline import add_baseline

GPU = "NVIDIA H200"
IMPLEMENTATIONS = ("frozen", "peft", "fused")
_FEW, _MORE = 2, 6
_HEADS, _HEAD_DIM, _TOKENS, _RANK = 1, 16, 64, 16


class _Driver:
    """A GPU's driver as Triton's launch path asks it; `launches` counts the kernels that it was given."""

    launches = 0

    def get_current_device(self) -> "_Driver":
        return self  # Triton keeps compiled kernels by device: these are nobody else's

    def get_current_stream(self, device: "_Driver") -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def compile(self, kernel, key, signature, device, constants, options, *rest) -> "_Compiled":
        """Instead of the compiler's result: a kernel whose launch is this driver's."""
        made = kernel.device_caches[device][0][key] = _Compiled(self)
        return made


class _Compiled:
    """What Triton's path asks of a compiled kernel up to the driver's call."""

    function, packed_metadata = 0, ()

    def __init__(self, driver: _Driver):
        self._driver = driver

    def launch_metadata(self, grid, stream, *args) -> None:
        return None

    def run(self, *args) -> None:
        self._driver.launches += 1

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable:
        from triton import knobs

        def runner(*args, stream=None) -> None:  # as Triton's own, line by line
            metadata = self.launch_metadata(grid, stream, *args)
            self.run(
                grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, metadata,
                knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *args,
            )  # fmt: skip

        return runner


@contextmanager
def stub_gpu(gpu_name: str = GPU) -> Iterator[_Driver]:
    """Inside, fused ops on CPU tensors run as on the GPU of this name, but for the kernels themselves.

    Raises:
        ValueError: no table is committed for that GPU.
    """
    from mmpeft_kernels.row_chunks import assumed_multiprocessors
    from mmpeft_kernels.tile import assumed_architecture
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from mmpeft_fast.ops import kernels_triton

    table = dispatch.table_named(gpu_name)
    if table is None:
        raise ValueError(f"bench.host: expected a GPU with a committed table, got {gpu_name!r}")
    stub = _Driver()
    _forget_choices()
    with ExitStack() as stack:
        stack.callback(_forget_choices)
        stack.enter_context(assumed_architecture(table.architecture))
        stack.enter_context(assumed_multiprocessors(132))
        replaced = [
            (dispatch, "is_gpu", lambda device: True), (dispatch, "table_of", lambda device: table),
            (kernels_triton, "unsupported", lambda x: None),
            (JITFunction, "_do_compile", lambda kernel, *args, **options: stub.compile(kernel, *args, **options)),
        ]  # fmt: skip
        for home, name, replacement in replaced:
            stack.callback(setattr, home, name, getattr(home, name))
            setattr(home, name, replacement)
        stack.callback(driver.set_active, driver._active)
        driver.set_active(stub)
        stack.enter_context(provider("triton"))
        yield stub


def _forget_choices() -> None:
    from mmpeft_kernels import launch

    dispatch.read_again()
    launch.forget()


def model(num_layers: int, implementation: str) -> nn.Module:
    """The decoder of a bf16 LLaMA, LoRA with dropout on all its linears."""
    width = _HEADS * _HEAD_DIM
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=num_layers, num_attention_heads=_HEADS,
        vocab_size=32, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    made = LlamaForCausalLM(config).to(torch.bfloat16).train()
    decoder = made.model
    if implementation == "frozen":
        made.requires_grad_(False)
        return decoder
    made, _ = add_baseline(made, LoRA(r=_RANK, alpha=2 * _RANK, dropout=0.05))
    if implementation == "fused":
        fuse(made.train())
    return decoder


def pass_of(made: nn.Module) -> Callable[[], None]:
    """Forward and backward of one batch; gradients go as in training."""
    ids = torch.zeros(1, _TOKENS, dtype=torch.long)
    embeddings = torch.zeros(1, _TOKENS, made.get_input_embeddings().embedding_dim, dtype=torch.bfloat16)
    mask, upstream = torch.ones_like(ids), torch.zeros_like(embeddings)
    parameters = [parameter for parameter in made.parameters() if parameter.requires_grad]

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        inputs = embeddings.clone().requires_grad_()
        made(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state.backward(upstream)

    return run


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, small products cost about what their launch costs on a GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what stub kernels leave unwritten may be anything
    try:
        with torch.backends.mkldnn.flags(enabled=False):  # 20 us a product
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def layer_times(rounds: int = 40, gpu_name: str = GPU) -> dict[str, float]:
    """Milliseconds a layer by implementation, and `launches`, the Triton kernels of a fused layer."""
    with _one_thread(), stub_gpu(gpu_name) as stub:
        passes = {(name, n): pass_of(model(n, name)) for n in (_FEW, _MORE) for name in IMPLEMENTATIONS}
        least, counts = dict.fromkeys(passes, float("inf")), {}
        for key, run in passes.items():
            run()
            before = stub.launches
            run()
            counts[key] = stub.launches - before
        for _ in range(rounds):
            for key, run in passes.items():
                start = time.thread_time()
                run()
                least[key] = min(least[key], time.thread_time() - start)
    layers = _MORE - _FEW
    found = {f"{name}_ms": 1e3 * (least[name, _MORE] - least[name, _FEW]) / layers for name in IMPLEMENTATIONS}
    return {**found, "launches": (counts["fused", _MORE] - counts["fused", _FEW]) / layers}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--gpu", default=GPU, help="GPU whose table decides which kernels run (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of the sentence")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append the row to")
    args = parser.parse_args(arguments)
    found = layer_times(args.rounds, args.gpu)
    settings = {"method": "lora", "dtype": "bf16", "gpu": args.gpu, "tapes": tape.is_on()}
    row = {"op": "host", "mode": "fwd_bwd", **settings, **found}
    if args.json:
        print(json.dumps(row))
    else:
        times = ", ".join(f"{name} {found[f'{name}_ms']:.2f} ms" for name in IMPLEMENTATIONS)
        print(f"host time a layer, forward and backward: {times}; {found['launches']:g} Triton launches a fused layer")
    if args.out:
        append_rows(args.out, [{**row, **environment()}])


if __name__ == "__main__":
    main()
