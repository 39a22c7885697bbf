"""Sizes around the block that a kernel's loop goes by: less than one, exactly one, one and a bit,
several. Kernels run in the emulator with small blocks of their own."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fast.attention import SHORT, piece_sizes, pieces
from fast.launch import Launch
from fast.moe import Experts
from fast.prefill.moe import Sort
from fast.prefill.span import number_of_rows
from fast.prefill.tiles import PRODUCTS, expert_rows, product_tiles
from tests.support.fast_cases import CPU
from tests.support.prefill_nodes import Poisoned
from tools.gfx950.target import emulate

pytest.importorskip("triton")

ROWS = 16


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def launched(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    x, y, z = (*grid, 1, 1)[:3]
    emulate([Launch(kernel.__name__, kernel, (x, y, z), arguments, {"num_warps": 1})])


# --- a context in pieces


def begins(near: int, far: int, count: int) -> list[int]:
    """Where the pieces begin: short ones, then long ones."""
    return [min(i, SHORT) * near + max(i - SHORT, 0) * far for i in range(count)]


@pytest.mark.parametrize("shared", [4, 16])
def test_pieces_cover_a_context_and_none_is_empty(shared: int) -> None:
    near, far = piece_sizes(shared)
    whole = SHORT * near
    for length in (1, near - 1, near, near + 1, 5 * near + 7, whole - 1, whole, whole + 1,
                   whole + far - 1, whole + far, whole + far + 1, whole + 9 * far + 3):  # fmt: skip
        count = pieces(length, near, far)
        first = begins(near, far, count + 1)
        assert first[count - 1] < length <= first[count], length


@pytest.mark.parametrize("length", [1, 16, 17, 7 * 16, 8 * 16, 8 * 16 + 1, 23 * 16 + 5,
                                    SHORT * 16, SHORT * 16 + 1, SHORT * 16 + 9 * 64 + 1,
                                    SHORT * 16 + 384 * 64, SHORT * 16 + 400 * 64 + 1])  # fmt: skip
def test_the_pieces_of_a_context_are_added_eight_at_a_time(length: int) -> None:
    """The numbers of pieces are below eight, eight, and above; the last ones are more than the
    peaks that are compared at a time. Pieces are short and long. The numbers
    behind the last piece would spoil the sum."""
    from fast.kernels.attention import combine

    H, G, K, near, far = 2, 1, 16, 16, 64
    count = pieces(length, near, far)
    partial, peaks, totals = (
        random(seed, count + 3, 1, H, *more) for seed, more in enumerate(((K,), (), ()))
    )
    peaks, totals = peaks * 100, totals.abs() + 1  # a sum of 2^peak would be infinite
    for tensor, unread in ((partial, torch.nan), (peaks, 1e30), (totals, torch.nan)):
        tensor[count:] = unread
    projected, out = (
        random(4, 1, 2 * H * K + 2 * G * K).bfloat16(),
        torch.empty(1, H * K).bfloat16(),
    )
    launched(
        combine, (1, H, 2), projected=projected, partial=partial, peaks=peaks, totals=totals, out=out,
        start=torch.tensor([length - 1], dtype=torch.int32), rows=1, H=H, G=G, K=K, NEAR=near, FAR=far,
        MANY=8, WIDTH=8,
    )  # fmt: skip
    share = (peaks[:count] - peaks[:count].amax(0)).double().exp2()[..., None]
    read = (share * partial[:count]).sum(0) / (share * totals[:count, ..., None]).sum(
        0
    )  # [1, H, K]
    gate = projected[0, : 2 * H * K].double().view(H, 2, K)[:, 1]
    expected = (read[0] * gate.sigmoid()).flatten()
    assert torch.allclose(out[0].double(), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    "length", [1, 15, 16, 17, 65, SHORT * 64, SHORT * 64 + 1, SHORT * 64 + 128 + 70]
)
def test_each_piece_attends_to_its_own_positions(length: int, fp8: bool, tile: int) -> None:
    """A piece is as long as a tile, or longer. It attends to the newest position, which it writes,
    and to none behind it. In e4m3 each position has scales of its own."""
    from fast.kernels.attention import attend

    H, G, K, near, far = 2, 1, 16, 64, 128
    capacity = (
        SHORT * near + 2 * far
    )  # the same for all lengths, so that the kernel is compiled once
    count = pieces(capacity, near, far)
    keys, values = (random(seed, G, capacity, K).bfloat16() for seed in range(2))
    scales = [torch.empty(0, dtype=torch.uint8)] * 2
    if fp8:
        keys, values = (8 * held.float() for held in (keys, values))
        keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
        scales = [(122 + 2 * random(seed, G, capacity)).to(torch.uint8) for seed in (5, 6)]
    for held in (keys, values, *(scales if fp8 else ())):
        held[:, length - 1 :] = 255 if held.dtype == torch.uint8 else torch.nan
    projected = random(2, 1, 2 * H * K + 2 * G * K).bfloat16()
    partial = torch.full((count, 1, H, K), torch.nan)
    peaks, totals = (torch.full((count, 1, H), torch.nan) for _ in range(2))
    launched(
        attend, (count, G, 1), projected=projected, q_gain=torch.zeros(K).bfloat16(),
        k_gain=torch.zeros(K).bfloat16(), cosine=torch.ones(capacity, 4), sine=torch.zeros(capacity, 4),
        keys=keys, values=values, key_scales=scales[0], value_scales=scales[1], partial=partial,
        peaks=peaks, totals=totals, start=torch.tensor([length - 1], dtype=torch.int32), rows=1, eps=1e-6,
        H=H, G=G, K=K, ROTARY=8, CAPACITY=capacity, NEAR=near, FAR=far, GROUP=4, FP8=fp8, TILE=tile,
        BLOCK=16,
    )  # fmt: skip
    query, _ = projected[0, : 2 * H * K].double().view(H, 2, K).unbind(1)
    new_key, new_value = projected[0, 2 * H * K :].view(2, K)
    query, key = (
        x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, new_key.double())
    )
    assert keys[:, length:].double().isnan().all() and values[:, length:].double().isnan().all()
    seen_keys, seen_values = keys[0, :length].double(), values[0, :length].double()
    if fp8:
        seen_keys, seen_values = (
            seen * (scale[0, :length].double() - 127).exp2()[:, None]
            for seen, scale in zip((seen_keys, seen_values), scales, strict=True)
        )
    assert torch.allclose(seen_keys[-1], key, rtol=0.07 if fp8 else 1e-2, atol=1e-3)
    assert torch.allclose(seen_values[-1], new_value.double(), rtol=0.07 if fp8 else 0, atol=1e-3)
    used = pieces(length, near, far)
    scores = query.bfloat16().double() @ seen_keys.T / K**0.5  # [H, length]
    edges = [*begins(near, far, used), length]
    for piece, (first, end) in enumerate(pairwise(edges)):
        share = (scores[:, first:end] - peaks[piece, 0].double()[:, None] * math.log(2)).exp()
        assert torch.allclose(share.amax(1), torch.ones(H).double(), rtol=2e-2)
        assert torch.allclose(totals[piece, 0].double(), share.sum(1), rtol=2e-2)
        read = share @ seen_values[first:end]
        largest = seen_values[first:end].abs().amax()
        assert torch.allclose(
            partial[piece, 0].double(), read, rtol=3e-2, atol=3e-2 * (end - first) ** 0.5 * largest
        )
    assert partial[used:].isnan().all() and peaks[used:].isnan().all()


# --- the likeliest token of many blocks


@pytest.mark.parametrize("blocks", [1, 15, 16, 17, 32, 33, 40])
def test_a_token_is_picked_from_any_number_of_blocks(blocks: int) -> None:
    """Sixteen at a time: the largest in each place, ties to the earlier block, NaN in each place."""
    from fast.kernels.head import NOT_FINITE, pick

    def picked(best: Tensor, place: Tensor) -> int:
        tokens = torch.full((1,), 99, dtype=torch.int32)
        of_rows = torch.full((blocks, ROWS), torch.nan), torch.full((blocks, ROWS), 77).int()
        for held, of_row in zip(of_rows, (best, place), strict=True):
            held[:, 0] = of_row
        launched(
            pick, (1,), best=of_rows[0], place=of_rows[1], tokens=tokens, largest=of_rows[0],
            blocks=blocks, first=0, STRIDE=ROWS, BLOCK=16, OF_PART=False,
        )  # fmt: skip
        return int(tokens)

    ids = torch.arange(blocks, dtype=torch.int32) * 100 + 7
    for at in {0, blocks // 2, blocks - 1}:
        best = random(blocks, blocks)
        best[at] = 9.0
        assert picked(best, ids) == ids[at]
        best[at:] = 9.0
        assert picked(best, ids) == ids[at]
        best[at] = -9.0  # of the other ids of a block with a NaN
        assert picked(best, ids.index_fill(0, torch.tensor([at]), NOT_FINITE.value)) == -1


# --- pairs of rows and experts in tiles


@pytest.mark.parametrize("pairs", [1, 3, 4, 5, 8, 9, 600])
@pytest.mark.parametrize("experts", [1, 2, 7])
def test_tiles_hold_every_pair_once(pairs: int, experts: int) -> None:
    """A tile has at most four pairs, all of one expert. All pairs choose one expert, or several."""
    block = 4
    for ids in (
        torch.zeros(pairs),
        torch.full((pairs,), experts - 1),
        torch.arange(pairs) % experts,
        random(pairs, pairs).abs() * 2 % experts,
    ):
        chosen = ids.int()[:, None]
        sort = Sort(chosen, experts, block, number_of_rows(chosen), Poisoned(CPU))
        emulate(sort.work)
        found: list[int] = []
        for expert, first in zip(sort.tile_expert.tolist(), sort.tile_first.tolist(), strict=True):
            if expert == experts:  # no tile
                continue
            end = min(first + block, int(sort.expert_first[expert + 1]))
            assert 0 <= first < end
            held = sort.order[first:end]
            assert (chosen.flatten()[held] == expert).all()
            found += held.tolist()
        assert sorted(found) == list(range(pairs))


@pytest.mark.parametrize("rows, columns, blocks", [
    (64, 769, (64, 32)), (64, 2576, (64, 32)), (256, 769, (64, 32)), (256, 2576, (64, 128)),
    (512, 769, (64, 64)), (512, 2576, (128, 128)), (2048, 769, (128, 128)), (2048, 2576, (128, 256)),
])  # fmt: skip
def test_a_product_has_the_largest_blocks_that_keep_a_gpu_busy(
    rows: int, columns: int, blocks: tuple[int, int]
) -> None:
    found = product_tiles("sm_90", rows, columns)
    assert (found["BLOCK_M"], found["BLOCK_N"]) == blocks


@pytest.mark.parametrize(
    "pairs, rows", [(0, 16), (11.9, 16), (12, 32), (23, 32), (24, 64), (256, 128)]
)
def test_an_experts_tiles_have_as_many_rows_as_it_has_pairs(pairs: float, rows: int) -> None:
    assert expert_rows("sm_90", pairs) == rows


def test_the_steps_of_sums_are_the_same_for_all_numbers_of_rows() -> None:
    for known in PRODUCTS.values():
        assert len({one["BLOCK_K"] for one in known}) == 1


# --- columns of a row


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
@pytest.mark.parametrize("size", [16, 128, 272, 656])
def test_the_shared_experts_columns(size: int) -> None:
    """The programs of a gate-up take a block of columns each, and then again until none is left."""
    rows, E, D, parts = 3, 2, 128, 2
    node = Experts(E, D, 128, "gfx950", CPU)
    for weight in node.parameters():
        weight.zero_()
    logits = random(1, parts, rows, E + 1 + 2 * size)
    x, chosen = torch.zeros(rows, D).bfloat16(), torch.zeros(rows, 1).int()
    work, _ = node.launches(
        x, chosen, chosen.float(), Poisoned(CPU), shared=(logits, torch.zeros(D, size).bfloat16())
    )  # fmt: skip
    emulate(work[:1])
    gate, up = logits.double().sum(0)[:, E + 1 :].split(size, 1)
    found = work[0].arguments["shared"].double()
    assert torch.allclose(found, gate * gate.sigmoid() * up, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("size", [16, 32, 48, 64, 112])
def test_columns_of_a_row(size: int) -> None:
    """32 columns at a time: the shared expert's activation, and the sum of a row's experts."""
    from fast.kernels.prefill.moe import activate, combine

    rows, first = 3, 5
    N = first + 2 * size
    logits, out = random(1, rows, N), torch.full((rows, size), torch.nan).bfloat16()
    filled = number_of_rows(out)
    launched(
        activate, (rows,), logits=logits, out=out, filled=filled, N=N, FIRST=first, I=size, BLOCK=32
    )
    gate, up = logits[:, first:].bfloat16().double().split(size, 1)
    assert torch.allclose(out.double(), gate * gate.sigmoid() * up, rtol=1e-2, atol=1e-6)

    by_pair, weights = random(2, 2 * rows, size).bfloat16(), random(3, rows, 2)
    place = torch.arange(2 * rows - 1, -1, -1, dtype=torch.int32)
    residual, shared = (random(seed, rows, size).bfloat16() for seed in (4, 5))
    out = torch.full((rows, size), torch.nan).bfloat16()
    launched(
        combine, (rows, -(-size // 32)), by_pair=by_pair, place_of_pair=place, weights=weights,
        logits=logits, shared=shared, residual=residual, out=out, filled=filled, N=N, D=size,
        TOP_K=2,
        GATE=0, HAS_SHARED=True, HAS_RESIDUAL=True, BLOCK=32,
    )  # fmt: skip
    pairs = by_pair[place].double().view(rows, 2, size)
    opened = logits[:, :1].bfloat16().double().sigmoid()
    expected = (weights.double()[..., None] * pairs).sum(1) + opened * shared.double()
    expected += residual.double()
    assert torch.allclose(out.double(), expected, rtol=1e-2, atol=1e-2)
