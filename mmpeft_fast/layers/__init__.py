"""Drop-in modules: layers to build models from, and the classes that fused modules take on."""

from mmpeft_fast.layers.standalone import AdapterLinear, IA3Linear, LoRALinear, PrefixAttention, RMSNorm

__all__ = ["AdapterLinear", "IA3Linear", "LoRALinear", "PrefixAttention", "RMSNorm"]
