"""The machine's accelerator, its free memory, and the number formats that weights may have there."""

import psutil
import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MIXED_PRECISION = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of the frozen weights


def default_device() -> torch.device:
    """The machine's accelerator, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a lack of memory, by its type or, as of torch's allocators, by its words."""
    words = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "out of memory" in words or "not enough memory" in words or "can't allocate memory" in words
    )


def available_memory() -> int:
    """Bytes that are free where training happens: on the GPU if there is one, else in main memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    if torch.backends.mps.is_available():
        return int(min(torch.mps.recommended_max_memory(), psutil.virtual_memory().available))  # shared with the rest
    return int(psutil.virtual_memory().available)
