"""Triton kernels, one file per op, with the op's name: formula, kernel, and a launcher that takes its tile sizes.

No autograd, no dispatch, no environment variables: those live in mmpeft_fast.ops. Modules import Triton alone, so that
`mmpeft_kernels.aot` can compile them where there is neither a GPU nor torch; launchers import torch when called.
"""
