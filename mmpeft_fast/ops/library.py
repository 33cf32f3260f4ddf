"""The torch library that holds this package's registered ops, `torch.ops.mmpeft_fast.*`."""

import torch

LIBRARY = torch.library.Library("mmpeft_fast", "DEF")
