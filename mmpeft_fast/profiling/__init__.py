"""Where time and memory of a real step go: by op, by part of the model, by role of the tensors.

The package is not called `profile`, as that is the name of `mmpeft_fast.profile`, the context manager.
"""
