"""How a compiler sees this package's ops: `torch.ops.mmpeft_fast.*` in two layers.

A *traceable* op is what the public function calls under torch.compile. It is made of others, so AOTAutograd looks
through it: it runs the op's autograd function, whose forward and backward then call *opaque* ops. These hide which
kernels run and where tensors lie until they do run: what depends on it is never baked into a graph.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmpeft_fast.ops.library import LIBRARY


def traceable(name: str, schema: str, function: Callable) -> None:
    """Registers `mmpeft_fast::name` as a name of `function`; results may be views of one another or an argument."""
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")


def opaque(name: str, schema: str, run: Callable[..., list[Tensor]], fake: Callable[..., list[Tensor]]) -> None:
    """Registers `mmpeft_fast::name`, which returns Tensor[], as one call that no compiler looks into.

    run: computes it on real tensors and writes to none of its arguments. fake: contiguous tensors of the results'
    shapes, dtypes and device.
    """

    def run_apart(*arguments):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
        return _apart(run(*arguments), given)

    # A compiler lays out what reaches the kernels as it would have come without one.
    LIBRARY.define(f"{name}{schema} -> Tensor[]", tags=(torch.Tag.needs_exact_strides,))
    LIBRARY.impl(name, run_apart, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmpeft_fast::{name}", fake, lib=LIBRARY)


def _apart(results: Sequence[Tensor], taken: set[int]) -> list[Tensor]:
    """The results contiguous, each in memory of its own, as an op's contract wants it: copied where they are not. What
    is large comes as it has to be; parts of a stacked rank-sized gradient do not."""
    apart = []
    for tensor in results:
        storage = tensor.untyped_storage()
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        elif storage._cdata in taken or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage()._cdata)
        apart.append(tensor)
    return apart
