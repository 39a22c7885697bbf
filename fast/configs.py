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


# Defaults for shapes that the table does not have, taken without a warning: these kernels run about as
# fast with one configuration for all shapes.
USUAL: dict[str, dict[str, Config]] = {
    "gfx950": {
        "linear": {"BLOCK_N": 16, "BLOCK_K": 512, "num_warps": 1, "num_stages": 2},
        "route": {"BLOCK_N": 16, "BLOCK_K": 1024, "SPLITS": 2, "num_warps": 4, "num_stages": 1},
        "head": {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
        "attend": {"GROUP": 2, "TILE": 32, "num_warps": 4, "num_stages": 2},
        "attend_fp8": {"GROUP": 2, "TILE": 32, "num_warps": 4, "num_stages": 2},
        "combine": {"MANY": 128, "WIDTH": 64, "num_warps": 4},
        "delta": {"BLOCK_V": 16, "num_warps": 1},
    },
    "sm_90": {
        "linear": {"BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 1, "num_stages": 4},
        "route": {"BLOCK_N": 16, "BLOCK_K": 512, "SPLITS": 4, "num_warps": 4, "num_stages": 3},
        "head": {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
        "attend": {"GROUP": 4, "TILE": 64, "num_warps": 8, "num_stages": 2},
        "attend_fp8": {"GROUP": 2, "TILE": 32, "num_warps": 4, "num_stages": 3},
        "combine": {"MANY": 64, "WIDTH": 64, "num_warps": 4},
        "delta": {"BLOCK_V": 8, "num_warps": 1},
    },
}


@cache
def table() -> dict[str, dict[str, dict[str, Config]]]:
    """The whole of `configs.json`: target -> kernel -> shape, as `key` writes it -> configuration."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def key(**shape: int) -> str:
    """A shape as the table writes it, as in "D=4096 I=128"."""
    return " ".join(f"{name}={size}" for name, size in shape.items())


@cache
def lookup(target: str, kernel: str, shape: str) -> Config:
    """The configuration of a kernel for a shape, as `key` writes it.

    A shape that the table lacks gets the kernel's default. A kernel without a default gets the
    configuration of the nearest shape in the table, with a warning. InputError when there is none.
    """
    known = table().get(target, {}).get(kernel, {})
    if shape in known:
        return known[shape]
    if kernel in USUAL.get(target, {}):
        return USUAL[target][kernel]
    if not known:
        raise InputError(f"{TABLE.name} has no configuration of {kernel} for {target}")
    nearest = min(known, key=lambda other: _distance(shape, other))
    warnings.warn(
        f"{kernel} {shape} is not in {TABLE.name} for {target}; it runs with the configuration of "
        f"{nearest} (python -m tools.tune measures it)",
        stacklevel=2,
    )
    return known[nearest]


def fitted(config: Config, N: int, K: int, *, fp4: bool = True) -> Config:
    """A configuration with blocks that divide N and K. Both are multiples of 16, so no block is smaller.

    fp4 False: the weights are bf16, which take four times the memory, so blocks along K are at most 128.
    """
    n, k = math.gcd(config["BLOCK_N"], N), math.gcd(config["BLOCK_K"], K)
    if not fp4:
        return config | {"BLOCK_N": n, "BLOCK_K": math.gcd(k, 128)}
    warps = config["num_warps"]
    if k < config["BLOCK_K"]:
        # Fewer warps, so that each has more rows: for 16 rows by 128 elements Triton chooses a layout
        # that spreads a word of Hopper's codes over several threads (`launch.check_packing`).
        warps = min(warps, max(1, n // 32))
    return config | {"BLOCK_N": n, "BLOCK_K": k, "num_warps": warps}


def _distance(shape: str, other: str) -> float:
    """How far apart two shapes are: the sum over all sizes of |log2 of their quotient|."""
    sizes, others = ([int(part.split("=")[1]) for part in text.split()] for text in (shape, other))
    return sum(abs(math.log2(a / b)) for a, b in zip(sizes, others, strict=True))
