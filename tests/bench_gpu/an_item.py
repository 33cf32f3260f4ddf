"""Items of work for the tests of worker processes."""

import os


def process(raises: bool):
    yield {"process": os.getpid()}
    if raises:
        raise RuntimeError("spoiled")


def out_of_memory():
    import torch

    yield from ()
    raise torch.OutOfMemoryError("CUDA out of memory")
