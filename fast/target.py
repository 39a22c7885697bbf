"""The targets that the kernels are compiled for, and checks of a pass's rows."""

import torch

from qwen35.errors import InputError

TARGETS = ("gfx950", "sm_90")
KERNELS = ("triton", "hip")  # languages that nodes may have kernels in
GRID = 64  # tokens: prompts are computed on an absolute grid of it
MAX_ROWS = 8  # the most rows of a decode pass: one token and its drafts
# The fewest columns that a product of the matrix unit has; a decode pass's rows are padded to them.
ROWS = {"gfx950": 16, "sm_90": 8}


def target_of(device: torch.device) -> str:
    """The target of a device. InputError when it is none of `TARGETS`."""
    if device.type == "cuda":
        if torch.version.hip:
            name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        else:
            major, minor = torch.cuda.get_device_capability(device)
            name = f"sm_{major}{minor}"
        if name in TARGETS:
            return name
    else:
        name = device.type
    raise InputError(f"the fast path runs on {' and '.join(TARGETS)}; this is {name}")


def check_kernel(what: str, kernel: str) -> None:
    """InputError unless kernel is one of `KERNELS`."""
    if kernel not in KERNELS:
        raise InputError(f"{what} with kernel {kernel!r}; expected {' or '.join(KERNELS)}")


def check_width(what: str, x: torch.Tensor, width: int) -> None:
    """InputError unless x is [rows, width] in bf16."""
    if x.dim() != 2 or x.shape[-1] != width or x.dtype != torch.bfloat16:
        raise InputError(
            f"{what}: x of shape {list(x.shape)} and {x.dtype}; "
            f"expected [rows, {width}], torch.bfloat16"
        )


def check_rows(what: str, x: torch.Tensor, width: int) -> None:
    """InputError unless x is [rows, width] in bf16, of 1 to MAX_ROWS rows."""
    fits = x.dim() == 2 and x.shape[-1] == width and 1 <= x.shape[0] <= MAX_ROWS
    if not fits or x.dtype != torch.bfloat16:
        raise InputError(
            f"{what}: x of shape {list(x.shape)} and {x.dtype}; "
            f"expected [1 to {MAX_ROWS}, {width}], torch.bfloat16"
        )
