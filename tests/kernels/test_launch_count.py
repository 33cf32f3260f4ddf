"""How many kernels a decoder layer launches on the Triton provider, counted on meta tensors without running any."""

from collections import Counter

import pytest
import torch
import triton
from mmpeft_kernels.launches import recorded
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmpeft_fast import IA3, Adapter, LayerNorm, LoRA, Prefix, add_peft, fuse, provider

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is recorded")

# Ops that launch nothing: views and allocations.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
_FREE |= {"view", "_unsafe_view", "reshape", "transpose", "t", "expand", "unsqueeze", "squeeze", "slice", "select"}
_FREE |= {"split", "split_with_sizes", "as_strided", "permute", "unbind", "_reshape_alias", "set_"}


class Launches(TorchDispatchMode):
    """Counts launches inside by name: recorded Triton kernels, and every op of torch that does work."""

    def __init__(self):
        super().__init__()
        self.torch, self.triton = Counter(), []

    def __enter__(self):
        self._recording = recorded(self.triton)
        self._recording.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._recording.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.torch[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> Counter:
        return self.torch + Counter(launch["kernel"] for launch in self.triton)


def decoder_layer(method, dtype=torch.bfloat16):
    """The first of two fused decoder layers of LLaMA-7B's shape on meta, in training."""
    text = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, vocab_size=128
    )
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).to(dtype)
    return fuse(add_peft(model, method)).train().model.language_model.layers[0]


def count(layer, dtype=torch.bfloat16):
    x = torch.empty(4, 1024, 4096, dtype=dtype, device="meta", requires_grad=True)
    angles = torch.empty(1, 1024, 128, dtype=dtype, device="meta")
    forward, backward = Launches(), Launches()
    with provider("triton"):
        with forward:
            y = layer(x, position_embeddings=(angles, angles))
        with backward:
            y.backward(torch.empty_like(y))
    return forward.names, backward.names


# Forward and backward launches of a layer. With one kernel for h and the shrink, which cast D too, LoRA's forward took
# 4 and 8 fewer, each of which took several times what its parts take on an H200.
MOST = {
    "lora with dropout": (LoRA(r=16, alpha=32, dropout=0.05), 18, 26),
    "lora": (LoRA(r=16, alpha=32, dropout=0.0), 18, 26),
    "ia3": (IA3(), 9, 12),
    "adapter": (Adapter(bottleneck=64, dropout=0.05), 20, 25),
    "prefix": (Prefix(num_virtual_tokens=20), 12, 19),
    "layernorm": (LayerNorm(), 9, 11),
}


@pytest.mark.parametrize("case", MOST)
def test_launches_of_a_layer(case):
    method, most_forward, most_backward = MOST[case]
    layer = decoder_layer(method)
    count(layer)  # tables of segments are made once for each shape
    layer.zero_grad()
    forward, backward = count(layer)
    assert forward.total() <= most_forward, forward
    assert backward.total() <= most_backward, backward


def test_the_counter_counts():
    with Launches() as launches:
        x = torch.empty(4, 4, device="meta")
        (x.t() @ x).add_(1).view(16)
    assert launches.names == Counter({"mm": 1, "add_": 1})
