"""Block sizes of the prefill kernels, by target.

They change no bits, except for BLOCK_K and TILE, the steps of sums. These are the same for every number
of rows.
"""

from math import ceil, gcd

Tiles = dict[str, int]

BUSY = 80  # programs that keep most of a GPU's processors busy

TILES: dict[str, dict[str, Tiles]] = {
    "gfx950": {
        "grouped": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
        "grouped bf16": {
            "BLOCK_M": 64,
            "BLOCK_N": 64,
            "BLOCK_K": 64,
            "num_warps": 4,
            "num_stages": 2,
        },
        "attend": {"BLOCK_M": 64, "TILE": 32, "num_warps": 4, "num_stages": 1},
        "attend few": {"BLOCK_M": 64, "TILE": 32, "num_warps": 4, "num_stages": 1},
        "solve": {"num_warps": 8, "num_stages": 1},
        "read": {"num_warps": 4, "num_stages": 1},
    },
    "sm_90": {
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
        "attend few": {"BLOCK_M": 64, "TILE": 64, "num_warps": 4, "num_stages": 3},
        "solve": {"num_warps": 4, "num_stages": 1},
        # With at most 168 registers a thread, three programs share a processor, not two.
        "read": {"num_warps": 4, "num_stages": 1, "maxnreg": 168},
    },
}


# Blocks of a product, the largest first.
PRODUCTS: dict[str, list[Tiles]] = {
    "gfx950": [
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
    ],
    "sm_90": [
        {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 6},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 6},
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 6},
    ],
}
# Blocks of columns of the delta net's memory, the widest first.
SCANS: dict[str, list[Tiles]] = {
    "gfx950": [{"BLOCK_V": 32, "num_warps": 4, "num_stages": 1}],
    "sm_90": [
        {"BLOCK_V": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_V": 16, "num_warps": 4, "num_stages": 4},
    ],
}
# Each entry maps a least average of pairs per expert to the rows of a tile of MXFP4 experts.
EXPERT_ROWS: dict[str, dict[int, int]] = {
    "gfx950": {0: 64},
    "sm_90": {0: 16, 12: 32, 24: 64, 256: 128},
}


def tiles(target: str, kernel: str, **sizes: int) -> Tiles:
    """Block sizes of a kernel. For each name in `sizes` (as in BLOCK_K=4096), the gcd with that
    size."""
    known = TILES[target][kernel]
    return known | {name: gcd(known[name], size) for name, size in sizes.items()}


def product_tiles(target: str, rows: int, columns: int) -> Tiles:
    """Block sizes of a product of so many rows and columns: the largest that give BUSY programs, or the
    smallest."""
    known = PRODUCTS[target]

    def programs(one: Tiles) -> int:
        return ceil(rows / one["BLOCK_M"]) * ceil(columns / one["BLOCK_N"])

    return next((one for one in known if programs(one) >= BUSY), known[-1])


def scan_tiles(target: str, heads: int, V: int) -> Tiles:
    """Block sizes of `scan` for a memory of V columns in each head: the widest that give BUSY programs,
    or the narrowest."""
    known = SCANS[target]
    one = next((one for one in known if heads * V // one["BLOCK_V"] >= BUSY), known[-1])
    return one | {"BLOCK_V": gcd(one["BLOCK_V"], V)}


def expert_rows(target: str, pairs: float) -> int:
    """BLOCK_M of MXFP4 experts that have so many pairs on average."""
    return max((least, rows) for least, rows in EXPERT_ROWS[target].items() if least <= pairs)[1]
