"""Triton kernels, one file per op, with the op's name: formula, kernel, and a launcher that takes its tile sizes.

No autograd, no dispatch, no environment variables: those live in mmpeft_fast.ops. Empty of kernels for now.
"""
