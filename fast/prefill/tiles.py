"""Block sizes of the prefill kernels, by target. They are the same for every shape, but for a `scan`
of few heads."""

from math import gcd

Tiles = dict[str, int]

TILES: dict[str, dict[str, Tiles]] = {
    "gfx950": {
        "linear": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
        "grouped": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
        "grouped bf16": {
            "BLOCK_M": 64,
            "BLOCK_N": 64,
            "BLOCK_K": 64,
            "num_warps": 4,
            "num_stages": 2,
        },
        "attend": {"BLOCK_M": 64, "TILE": 32, "num_warps": 4, "num_stages": 1},
        "solve": {"num_warps": 8, "num_stages": 1},
        "write": {"num_warps": 4, "num_stages": 1},
        "scan": {"BLOCK_V": 32, "num_warps": 4, "num_stages": 1},
        "scan few": {"BLOCK_V": 32, "num_warps": 4, "num_stages": 1},
        "read": {"num_warps": 4, "num_stages": 1},
    },
    "sm_90": {
        "linear": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
        # BLOCK_N is 16 times num_warps: see kernels/mxfp4.py.
        "grouped": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
        "grouped bf16": {
            "BLOCK_M": 128,
            "BLOCK_N": 128,
            "BLOCK_K": 64,
            "num_warps": 8,
            "num_stages": 3,
        },
        "attend": {"BLOCK_M": 128, "TILE": 64, "num_warps": 8, "num_stages": 2},
        "solve": {"num_warps": 4, "num_stages": 1},
        "write": {"num_warps": 4, "num_stages": 1},
        "scan": {"BLOCK_V": 32, "num_warps": 4, "num_stages": 3},
        "scan few": {"BLOCK_V": 16, "num_warps": 4, "num_stages": 4},
        "read": {"num_warps": 4, "num_stages": 1},
    },
}


def tiles(target: str, kernel: str, **sizes: int) -> Tiles:
    """Block sizes of a kernel. For each name in `sizes` (as in BLOCK_K=4096), the gcd with that
    size."""
    known = TILES[target][kernel]
    return known | {name: gcd(known[name], size) for name, size in sizes.items()}
