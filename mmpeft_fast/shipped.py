"""Writes `layers/known.json`: what the installed libraries ship, for every family and every kind of tuner layer.

    python -m mmpeft_fast.shipped            # adds what is new; run the tests before you commit it
    python -m mmpeft_fast.shipped --check    # exit code 1 where something is missing

A layer whose classes are in the table is fused on the word of the tests that compare it with the unfused one: so an
entry is added only where those pass under the library versions that it names.
"""

import argparse
import itertools
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, VeraConfig, get_peft_model
from peft.tuners.ia3 import Linear as PeftIA3Linear
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import nn

from mmpeft_fast.atomic import write_text
from mmpeft_fast.fusion import candidates
from mmpeft_fast.layers import known
from mmpeft_fast.layers.causal_lm import called_parts
from mmpeft_fast.models import FAMILIES, Family, empty_model

_LINEARS = r".*\.(q|k|v|o|gate|up|down)_proj"
_NORMS = r".*\.(input_layernorm|post_attention_layernorm|norm)"


def _model(family: Family) -> nn.Module:
    ids = itertools.count()
    return empty_model(family.tiny_config(512, lambda token: next(ids)), dtype=torch.float32)


def learn() -> dict[str, dict[str, list[str]]]:
    """kind -> digest -> "class, library version" of everything that the fused code may bypass."""
    configs = (
        LoraConfig(r=2, target_modules=_LINEARS, lora_dropout=0.1),
        LoraConfig(r=2, target_modules=_LINEARS),
        LoraConfig(r=2, target_modules=_LINEARS, use_dora=True),
        VeraConfig(r=2, target_modules=_LINEARS),
        IA3Config(target_modules=_LINEARS, feedforward_modules=r".*\.down_proj"),
        LNTuningConfig(target_modules=_NORMS),
    )
    with known.learning() as learnt:
        known.judge_class(nn.SiLU, "silu")
        for kind in (PeftLoraLinear, PeftIA3Linear, ModulesToSaveWrapper, nn.ModuleDict, nn.Identity, nn.Dropout):
            known.judge_class(kind, "head")
        for family in FAMILIES.values():
            model = _model(family)
            candidates(model, family)
            for module, role in called_parts(model, family.decoder_of(model)):
                known.judge_class(type(module), role)
        llama = FAMILIES["llama"]
        for config in configs:
            candidates(get_peft_model(_model(llama), config), llama)
        if find_spec("bitsandbytes") is not None:
            from mmpeft_fast import quantised

            for kind, role in quantised.ROLES.items():
                known.judge_class(kind, role)
    table: dict[str, dict[str, list[str]]] = {}
    for (kind, digest), classes in sorted(learnt.items()):
        libraries = sorted({name.partition(".")[0] for name in classes})
        release = [f"{library} {version(library).partition('+')[0]}" for library in libraries]
        table.setdefault(kind, {})[digest] = [*release, *sorted(classes)]
    return table


def merged(table: dict, new: dict) -> dict:
    """Both tables; where both have a digest, the versions and classes of both."""
    both = {kind: dict(digests) for kind, digests in table.items()}
    for kind, digests in new.items():
        for digest, names in digests.items():
            both.setdefault(kind, {})[digest] = sorted({*both.get(kind, {}).get(digest, ()), *names})
    return {kind: dict(sorted(digests.items())) for kind, digests in sorted(both.items())}


def missing(table: dict, new: dict) -> list[str]:
    """What is installed and not in the table."""
    return [
        f"{kind}: {', '.join(names)}"
        for kind, digests in new.items()
        for digest, names in digests.items()
        if digest not in table.get(kind, {})
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something is missing")
    arguments = parser.parse_args()
    table, new = known.table(), learn()
    absent = missing(table, new)
    print("\n".join(absent) or "known.json has everything that is installed")
    if not arguments.check:
        path = Path(known.__file__).with_name(known.TABLE)
        write_text(path, json.dumps(merged(table, new), indent=1) + "\n")
    return 1 if arguments.check and absent else 0


if __name__ == "__main__":
    sys.exit(main())
