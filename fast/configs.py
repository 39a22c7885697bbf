"""Launch configurations by target, kernel and shape: `configs.json`, as `python -m tools.tune` writes it.

The number of rows is no part of a shape: it must not decide in which order anything is added.
"""

import json
import math
import warnings
from functools import cache
from pathlib import Path

from qwen35.errors import InputError

TABLE = Path(__file__).with_name("configs.json")
Config = dict[str, int]


@cache
def table() -> dict[str, dict[str, dict[str, Config]]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def key(**shape: int) -> str:
    """A shape as the table writes it, as in "D=4096 I=128"."""
    return " ".join(f"{name}={size}" for name, size in shape.items())


@cache
def lookup(target: str, kernel: str, shape: str) -> Config:
    """The configuration of a shape, or, with a warning, of the nearest one in the table."""
    known = table().get(target, {}).get(kernel, {})
    if shape in known:
        return known[shape]
    if not known:
        raise InputError(f"{TABLE.name} has no configuration of {kernel} for {target}")
    nearest = min(known, key=lambda other: _distance(shape, other))
    warnings.warn(
        f"{kernel} {shape} is not in {TABLE.name} for {target}; it runs as {nearest} "
        "(python -m tools.tune measures it)",
        stacklevel=2,
    )
    return known[nearest]


def fitted(config: Config, N: int, K: int) -> Config:
    """The same with blocks that divide N and K; both are multiples of 128, so that no block vanishes."""
    n, k = math.gcd(config["BLOCK_N"], N), math.gcd(config["BLOCK_K"], K)
    warps = config["num_warps"]
    if k < config["BLOCK_K"]:
        # More rows for each warp: of 16 rows by 128 elements Triton makes a layout that tears words of
        # Hopper's codes apart (`launch.check_packing`).
        warps = min(warps, max(1, n // 32))
    return config | {"BLOCK_N": n, "BLOCK_K": k, "num_warps": warps}


def _distance(shape: str, other: str) -> float:
    """In powers of two, over all sizes."""
    sizes, others = ([int(part.split("=")[1]) for part in text.split()] for text in (shape, other))
    return sum(abs(math.log2(a / b)) for a, b in zip(sizes, others, strict=True))
