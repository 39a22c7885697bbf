"""Chooses which nodes run fast, for `--path auto|fast|reference` and `load(path=...)`."""

import re
import warnings
from dataclasses import dataclass

import torch

from fast.layer import DecoderLayer
from fast.mtp import MTP
from fast.shapes import check_shapes
from fast.target import target_of
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.swap import Replacement

PATHS = ("auto", "fast", "reference")
TRITON = (3, 6), (3, 8)  # the kernels compile with versions from the first on and below the second


@dataclass(frozen=True)
class Choice:
    """The chosen path. name: "fast" or "reference". reason: why `auto` chose the reference, or
    ""."""

    name: str
    reason: str = ""

    @property
    def swaps(self) -> list[tuple[str, Replacement]]:
        """(pattern of node names, replacement) for the nodes that this path replaces."""
        if self.name == "reference":
            return []
        return [("layers.*", DecoderLayer), ("mtp", MTP)]  # pyright: ignore (classes with from_reference)


def choose_path(wanted: str, config: Config, device: torch.device, dtype: torch.dtype) -> Choice:
    """Choose the path for a model of this shape. InputError, with the reason, if `fast` cannot
    run."""
    if wanted not in PATHS:
        raise InputError(f"path {wanted!r}; expected {', '.join(PATHS)}")
    if wanted == "reference":
        return Choice("reference")
    try:
        target_of(device)
        check_shapes(config)
        if dtype != torch.bfloat16:
            raise InputError(f"the fast path computes in bfloat16; the dtype is {dtype}")
        line = unfit_triton()  # InputError where Triton is missing
    except InputError as error:
        if wanted == "fast":
            raise
        return Choice("reference", str(error))
    if line:
        warnings.warn(line, stacklevel=2)
    return Choice("fast")


def unfit_triton() -> str:
    """A sentence if the installed Triton is outside of `TRITON`, or "". InputError if it is
    missing."""
    from fast.kernels import triton

    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    (least, until), version = TRITON, tuple(map(int, found.groups())) if found else (0, 0)
    if least <= version < until:
        return ""
    bounds = [".".join(map(str, bound)) for bound in TRITON]
    return (
        f"Triton {triton.__version__} is installed; the kernels are checked with {bounds[0]} and later, "
        f"below {bounds[1]} (pip install -e '.[fast]')"
    )
