"""Planted faults of the kinds that a kernel's author slips on most: counters, the order of sums, nibbles,
groups of scales, rows beyond the last one, and offsets of 32 bits. The checks must find each."""

import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch

pytest.importorskip("triton")

import reference.moe
from fast.launch import Launch, Scratch, Work
from fast.linear import product
from fast.moe import Experts
from fast.prefill import linear as prefill_linear
from fast.prefill import moe as prefill_moe
from fast.prefill.span import number_of_rows
from tests.fast.prefill.test_faults import experts as prefill_experts
from tests.fast.test_faults import (
    any_arrival,
    block,
    choice,
    experts,
    experts_and_residual,
    wide_experts,
)
from tests.fast.test_faults_mixers import attention, delta_net, dense_layer
from tests.support.fast_cases import (
    CPU,
    TARGET,
    bits,
    case,
    config,
    emulated,
    quantised,
    random,
    routing,
)
from tests.support.fast_faults import Faults, as_tests
from tests.support.offsets import overflows, ttir

FAULTS = Faults()
fault = FAULTS.add
META = torch.device("meta")
EXPERTS, ROWS, WIDE = 1 << 14, 1 << 19, 1 << 20


# ---- the checks


def rows_alone() -> list[str]:
    """Rows together, in another order and alone; the first and the last slot cancel."""
    return bits(case(routing("returning", 2, 3, 24), cancelling=True))


def cancelling(K: int) -> torch.Tensor:
    """Two rows whose last quarter cancels the first one, where the weights of both are the same. Both
    are so large that the order of the sum decides many of a result's bits."""
    x = random(0, 2, K)
    x[:, : K // 4] *= 2**16
    x[:, -K // 4 :] = -x[:, : K // 4]
    return x.bfloat16()


@cache
def repeating_experts() -> Experts:
    """Their gates and ups repeat the first quarter of the weights in the last one."""
    slow = quantised(reference.moe.Experts(config(3, 1024, 128)), seed=30_000)
    for expert in slow:
        for part in (expert.gate_proj, expert.up_proj):
            for held in (part.weight, part.weight_scale):
                quarter = held.shape[1] // 4
                held[:, -quarter:] = held[:, :quarter]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Experts.from_reference(slow, TARGET)


def apart(run: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
    """Findings if the first row alone has other bits than beside the second one."""
    x = cancelling(1024)
    return [] if torch.equal(run(x[:1]), run(x)[:1]) else ["bits: row 0 alone"]


def gate_and_up_alone() -> list[str]:
    def run(x: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        ids, shares = torch.zeros(rows, 1, dtype=torch.int32), torch.ones(rows, 1)
        launches, _ = repeating_experts().launches(x, ids, shares, Scratch(CPU))
        emulated(launches)
        return launches[0].arguments["hidden"].view(-1, 8, 128)[0, :rows]

    return apart(run)


def product_alone() -> list[str]:
    weight = random(1, 64, 1024).bfloat16()
    weight[:, -256:] = weight[:, :256]

    def run(x: torch.Tensor) -> torch.Tensor:
        launch, out = product(x, weight, TARGET, Scratch(CPU), name="repeating")
        emulated([launch])
        return out.clone()

    return apart(run)


def offsets(work: list[Work]) -> list[str]:
    """Offsets of 32 bits that may wrap, in launches whose tensors have more than 2^31 elements."""
    loaded = {"tile_expert": (0, EXPERTS), "tile_first": (0, 10 * ROWS), "filled": (0, WIDE)}
    return [
        f"offset: {one.name} {base}"
        for one in work
        if isinstance(one, Launch)
        for base, _ in overflows(ttir(one, TARGET), one, loaded)
    ]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def many_experts(rows: int) -> list[Work]:
    node = Experts(EXPERTS, 4096, 1024, TARGET, META, fp4=True)
    given = empty(rows, 4096), empty(rows, 10, dtype=torch.int32), empty(rows, 10)
    if rows <= 8:
        return [*node.launches(*given, Scratch(META))[0]]
    return prefill_moe.experts(node, *given, number_of_rows(given[0]), Scratch(META))[0]


def experts_offsets() -> list[str]:
    return offsets(many_experts(8))


def prefill_experts_offsets() -> list[str]:
    return offsets(many_experts(ROWS))


def product_offsets() -> list[str]:
    weight = empty(WIDE, 4096)
    return offsets([product(empty(8, 4096), weight, TARGET, Scratch(META), name="wide")[0]])


def prefill_product_offsets() -> list[str]:
    x, weight, residual = empty(WIDE, 4096), empty(WIDE, 4096), empty(WIDE, WIDE)
    given = x, weight, TARGET, Scratch(META), number_of_rows(x)
    return offsets([prefill_linear.product(*given, name="wide", residual=residual)[0]])


# ---- the faults

ADDED = "tl.atomic_add(arrived + tl.program_id(0), 1,"
fault(
    "an arrival counted twice",
    "moe",
    experts,
    "arrived unwritten",
    (ADDED, ADDED.replace("1,", "2,")),
)
fault(
    "one counter for all blocks of columns",
    "moe",
    any_arrival,
    "arrived memory unwritten",
    (ADDED, ADDED.replace(" + tl.program_id(0)", "")),
)
fault(
    "each block of columns sets back the first one's counter",
    "moe",
    wide_experts,
    "arrived",
    ("tl.store(arrived + tl.program_id(0), 0)", "tl.store(arrived, 0)"),
)
fault(
    "the router counts a program twice",
    "router",
    choice,
    "arrived unwritten",
    ("tl.atomic_add(arrived, 1,", "tl.atomic_add(arrived, 2,"),
)
fault(
    "the router's counter set back to one",
    "router",
    choice,
    "arrived",
    ("        tl.store(arrived, 0)\n", "        tl.store(arrived, 1)\n"),
)
fault(
    "the delta net's heads share a counter",
    "deltanet",
    delta_net,
    "arrived unwritten numbers",
    ("tl.atomic_add(arrived + head, 1,", "tl.atomic_add(arrived, 1,"),
)

SHARE = "share = tl.load(weights + row * TOP_K + slot,"
SOURCE = "source = tl.load(first + row * TOP_K + slot, mask=row < rows, other=0)"
fault(
    "the sum over the slots begins with the number of rows",
    "moe",
    rows_alone,
    "bits",
    (SHARE, SHARE.replace("slot", "(slot + rows) % TOP_K")),
    (SOURCE, SOURCE.replace("slot", "(slot + rows) % TOP_K")),
)
fault(
    "each row begins its sum with another slot",
    "moe",
    rows_alone,
    "bits",
    (SHARE, SHARE.replace("slot", "(slot + row) % TOP_K")),
    (SOURCE, SOURCE.replace("slot", "(slot + row) % TOP_K")),
)
LOOP = "for k in tl.range(0, D, BLOCK_K):\n                w, s"
BACK = (
    "for step in tl.range(0, D, BLOCK_K):\n"
    "                k = tl.where(rows > 1, D - BLOCK_K - step, step)\n"
)
fault(
    "gate and up summed from the other end where there are several rows",
    "moe",
    gate_and_up_alone,
    "bits",
    (LOOP, BACK + "                w, s"),
)
fault(
    "a product summed from the other end where there are several rows",
    "linear",
    product_alone,
    "bits",
    (
        "for offset in tl.range(0, K, BLOCK_K):\n",
        "for step in tl.range(0, K, BLOCK_K):\n"
        "        offset = tl.where(rows > 1, K - BLOCK_K - step, step)\n",
    ),
)

fault(
    "both elements of a byte the first one",
    "mxfp4",
    experts,
    "numbers",
    ("dot_scaled(weight,", "dot_scaled((weight & 15) | (weight << 4),"),
)
fault(
    "signs of the elements dropped",
    "mxfp4",
    experts,
    "numbers",
    ("dot_scaled(weight,", "dot_scaled(weight & 0x77,"),
)
fault(
    "bytes of gate and up in pairs exchanged",
    "moe",
    experts,
    "numbers",
    ("place(n, byte, D // 2,", "place(n, byte ^ 1, D // 2,"),
)
fault(
    "bytes of down in pairs exchanged",
    "moe",
    experts,
    "numbers",
    (
        "n * (I // 2) + tl.arange(0, BLOCK_K // 2)[None, :]",
        "n * (I // 2) + (tl.arange(0, BLOCK_K // 2) ^ 1)[None, :]",
    ),
)
fault(
    "high nibble first in a prompt's experts",
    "mxfp4",
    prefill_experts,
    "numbers",
    ('tl.trans(w), s, "e2m1"', 'tl.trans((w >> 4) | (w << 4)), s, "e2m1"'),
)

fault(
    "the scale of down's neighbouring group",
    "moe",
    experts,
    "numbers",
    (
        "n * (I // 32) + tl.arange(0, BLOCK_K // 32)[None, :]",
        "n * (I // 32) + (tl.arange(0, BLOCK_K // 32) ^ 1)[None, :]",
    ),
)
fault(
    "gate and up with the scales of the first block alone",
    "moe",
    wide_experts,
    "numbers",
    ("tl.load(scales + k // 32 * TILE_N)", "tl.load(scales + 0 * k)"),
)
fault(
    "down with the scales of the first block alone",
    "moe",
    wide_experts,
    "numbers",
    ("tl.load(scales + k // 32)", "tl.load(scales + 0 * k)"),
)
fault(
    "down with the scales of the row below",
    "moe",
    experts,
    "numbers",
    ("scales = scale + n * (I // 32)", "scales = scale + (n ^ 1) * (I // 32)"),
)
fault(
    "the scale of the neighbouring group in a prompt's experts",
    "mxfp4",
    prefill_experts,
    "numbers",
    (
        "n, tl.arange(0, BLOCK_K // 32)[None, :], K",
        "n, (tl.arange(0, BLOCK_K // 32) ^ 1)[None, :], K",
    ),
)

fault(
    "output rows stored without a mask",
    "moe",
    experts,
    "memory",
    (
        "tl.store(out + place, total.to(tl.bfloat16), mask=row < rows)",
        "tl.store(out + place, total.to(tl.bfloat16))",
    ),
)
fault(
    "the residual read without a mask",
    "moe",
    experts_and_residual,
    "memory",
    ("tl.load(residual + place, mask=row < rows, other=0.0)", "tl.load(residual + place)"),
)
fault(
    "parts of the router stored without a mask of rows",
    "router",
    choice,
    "memory",
    ("acc, mask=(n[:, None] < N) & (row[None, :] < rows))", "acc, mask=n[:, None] < N)"),
)
fault(
    "parts of the router stored without a mask of columns",
    "router",
    choice,
    "memory choice",
    ("acc, mask=(n[:, None] < N) & (row[None, :] < rows))", "acc, mask=row[None, :] < rows)"),
)
fault(
    "the choice stored for rows that are not there",
    "router",
    choice,
    "memory",
    ("inside = (lane < TOP_K) & (row < rows)", "inside = lane < TOP_K"),
)
fault(
    "the choice stored for slots that are not there",
    "router",
    choice,
    "memory choice",
    ("inside = (lane < TOP_K) & (row < rows)", "inside = row < rows"),
)
fault(
    "the shared expert's columns read beyond their end",
    "moe",
    block,
    "memory numbers",
    ("inside = (row < rows) & (i < I)", "inside = i < I"),
)
fault(
    "queries of rows that are not there",
    "attention",
    attention,
    "memory",
    ("valid = (m < GROUP * SHARED) & (row < rows)", "valid = m < GROUP * SHARED"),
)
fault(
    "keys behind the last one",
    "attention",
    attention,
    "numbers unwritten",
    ("tl.where(p[None, :] <= position, score", "tl.where(p[None, :] < end + TILE, score"),
)
fault(
    "a product's rows read without a mask",
    "linear",
    dense_layer,
    "memory",
    ("tl.load(inputs + offset, mask=row[None, :] < rows, other=0.0)", "tl.load(inputs + offset)"),
)

fault(
    "an expert's offset of 32 bits",
    "moe",
    experts_offsets,
    "offset",
    ("expert = bounded(chosen, E).to(tl.int64)", "expert = bounded(chosen, E)"),
)
fault(
    "a row's offset in down of 32 bits",
    "moe",
    experts_offsets,
    "offset",
    ("(tl.load(experts + pair), E).to(tl.int64) * D", "(tl.load(experts + pair), E) * D"),
)
fault(
    "a product's offset of 32 bits",
    "linear",
    product_offsets,
    "offset",
    ("tl.minimum(n, N - 1)[:, None].to(tl.int64) * K", "tl.minimum(n, N - 1)[:, None] * K"),
)
fault(
    "a prompt's row of 32 bits",
    "prefill/linear",
    prefill_product_offsets,
    "offset",
    ("tl.minimum(row, rows - 1)[:, None].to(tl.int64)", "tl.minimum(row, rows - 1)[:, None]"),
)
fault(
    "a prompt's weight of 32 bits",
    "prefill/linear",
    prefill_product_offsets,
    "offset",
    ("tl.minimum(n, N - 1)[None, :].to(tl.int64)", "tl.minimum(n, N - 1)[None, :]"),
)
fault(
    "a prompt's output of 32 bits",
    "prefill/linear",
    prefill_product_offsets,
    "offset",
    ("line = row[:, None].to(tl.int64)", "line = row[:, None]"),
)
fault(
    "a prompt's pair of 32 bits",
    "prefill/moe",
    prefill_experts_offsets,
    "offset",
    ("line = bounded(pair, pairs).to(tl.int64)", "line = bounded(pair, pairs)"),
)
fault(
    "an expert of a prompt's pair of 32 bits",
    "prefill/moe",
    prefill_experts_offsets,
    "offset",
    ("n = expert.to(tl.int64) * N", "n = expert * N"),
)


test_a_fault_is_found, test_without_a_fault_nothing_is_found = as_tests(FAULTS, __name__)
