"""Chooses which nodes run fast, for `--path auto|fast|reference`, `--moe-kernel` and `load(path=...)`."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fast import hip, hip_compiler
from fast.layer import DecoderLayer
from fast.mtp import MTP
from fast.shapes import check_hip, check_shapes
from fast.target import KERNELS, target_of
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.swap import Replacement
from weights.entry import Entry

FAST = {"layers.*": DecoderLayer, "mtp": MTP}  # patterns of nodes, and what replaces them
PATHS = ("auto", "fast", "reference")
TRITON = (3, 6), (3, 8)  # the kernels compile with versions from the first on and below the second


@dataclass(frozen=True)
class Choice:
    """The chosen path. name: "fast" or "reference". reason: why `auto` chose the reference, or
    "". moe_kernel: of the fast path's experts and their router, one of `fast.target.KERNELS`."""

    name: str
    reason: str = ""
    moe_kernel: str = "triton"

    @property
    def swaps(self) -> list[tuple[str, Replacement]]:
        """(pattern of node names, replacement) for the nodes that this path replaces."""
        if self.name == "reference":
            return []
        return [(name, Packed(kind, kernel=self.moe_kernel)) for name, kind in FAST.items()]


class Packed:
    """A class of the fast path, with settings for its `from_reference`."""

    def __init__(self, kind: Any, **settings: Any) -> None:
        self.kind, self.settings = kind, settings

    def from_reference(self, module: nn.Module) -> nn.Module:
        return self.kind.from_reference(module, **self.settings)


def choose_path(
    wanted: str,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    moe_kernel: str = "triton",
) -> Choice:
    """Choose the path for a model of this shape. InputError, with the reason, if `fast` cannot run.

    moe_kernel: "hip" needs the fast path on gfx950, so `auto` is `fast` then."""
    if wanted not in PATHS:
        raise InputError(f"path {wanted!r}; expected {', '.join(PATHS)}")
    if moe_kernel not in KERNELS:
        raise InputError(f"moe_kernel {moe_kernel!r}; expected {' or '.join(KERNELS)}")
    if moe_kernel == "hip":
        _check_hip(wanted, config, device)
        wanted = "fast"
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
    return Choice("fast", moe_kernel=moe_kernel)


def _check_hip(path: str, config: Config, device: torch.device) -> None:
    """InputError if the HIP kernels cannot run this model here."""
    if path == "reference":
        raise InputError("moe_kernel hip is of the fast path; the path is reference")
    check_hip_card(device)
    check_hip(config)
    hip_compiler.find()
    hip.runtime()


def check_hip_card(device: torch.device) -> None:
    """InputError unless the device is the card that the HIP kernels are for."""
    try:
        target = target_of(device)
    except InputError:
        target = device.type
    if target != hip_compiler.ARCHITECTURE:
        raise InputError(f"moe_kernel hip runs on {hip_compiler.ARCHITECTURE}; this is {target}")


def check_mxfp4(entries: Mapping[str, Entry]) -> None:
    """InputError if a checkpoint has an expert in a layer that the HIP kernels do not take. entries:
    by parameter. An MTP head whose experts are in bf16 keeps Triton's kernels."""
    for name, entry in entries.items():
        if name.startswith("layers.") and ".experts." in name and entry.format != "mxfp4":
            raise InputError(
                f"{entry.stored_as}: {entry.dtype}; moe_kernel hip takes experts in MXFP4"
            )


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
