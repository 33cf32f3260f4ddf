"""mmpeft-fast: parameter-efficient fine-tuning of multimodal LLMs at the cost of running the frozen model.

import mmpeft_fast
mmpeft_fast.add_peft(model, mmpeft_fast.LoRA(r=16, alpha=32))
mmpeft_fast.fuse(model)
"""

import importlib

__version__ = "0.1.0"

# Names are imported on first use, so that the command line's --help does not wait for torch.
_HOMES = {
    "average_peft": "stored.average",
    "add_peft": "peft_model",
    "FuseCallback": "hf_trainer",
    "as_unfused": "verify",
    "cache_vision": "train.vision",
    "compare": "verify",
    "fuse": "peft_model",
    "fuse_report": "fusion",
    "is_fused": "peft_model",
    "load_peft": "stored.checkpoint",
    "merge_peft": "stored.merge",
    "save_peft": "stored.checkpoint",
    "study_method": "peft_model",
    "unfuse": "peft_model",
    "Documents": "documents",
    "Method": "methods",
    "Placement": "placement",
    "BranchPlacement": "placement",
    "TaskPlacement": "placement",
    "register_method": "methods",
    "register_family": "models",
    "Family": "models",
    "Adapter": "methods",
    "DoRA": "methods",
    "IA3": "methods",
    "LayerNorm": "methods",
    "LoRA": "methods",
    "LoRAFA": "methods",
    "METHODS": "methods",
    "MOELoRA": "methods",
    "MSPLoRA": "methods",
    "Prefix": "methods",
    "ShareLoRA": "methods",
    "VeRA": "methods",
    "make_method": "methods",
    "FAMILIES": "models",
    "load_pretrained": "models",
    "provider": "ops.providers",
    "peak_bytes": "measure",
    "profile": "profiling.session",
    "saved_bytes": "measure",
    "shared_rows": "contexts",
    "SharedRows": "contexts",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted(__all__)
