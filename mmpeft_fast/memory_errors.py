"""Whether an error says that memory ran out."""

# How torch says that a CPU has no more memory: a RuntimeError, without a class of its own.
ALLOCATOR = "DefaultCPUAllocator: "


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch on a GPU or torch on a CPU found no memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or ALLOCATOR in str(error)
