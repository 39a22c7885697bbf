"""Planted faults in the kernels for a prompt's rows: the checks must find each."""

import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from fast.prefill import attention as attention_work
from fast.prefill import moe
from fast.prefill.span import number_of_rows
from tests.fast.prefill.test_moe import output
from tests.support.fast_cases import (
    case,
    exact_rows,
    expected,
    fast_block,
    routing,
    slow_block,
    too_far,
    wide_block,
)
from tests.support.fast_faults import Faults, as_tests
from tests.support.fast_nodes import Pass, a_pass
from tests.support.prefill_nodes import CPU, Poisoned, cut_findings, prefill_findings
from tools.gfx950.emulator import EmulatorError
from tools.gfx950.target import emulate

FAULTS = Faults()
fault = FAULTS.add


# ---- the checks


def delta_net() -> list[str]:
    return prefill_findings(a_pass("linear_attn", 70, linear_num_value_heads=4))


def equal_rows() -> list[str]:
    """A delta net without decay whose keys are all alike: far tokens of a chunk depend on each other."""
    return prefill_findings(without_decay())


@cache
def without_decay() -> Pass:
    what = a_pass("linear_attn", 70, linear_num_value_heads=4)
    what = replace(what, model=copy.deepcopy(what.model))  # other tests have the model too
    what.x[:] = what.x[:1]
    what.node.A_log.fill_(-20)
    return what


def attention() -> list[str]:
    return prefill_findings(a_pass("self_attn", 70, length=64))


def attention_in_parts() -> list[str]:
    return cut_findings(a_pass("self_attn", 140, length=64), (64,))


def attention_in_pieces() -> list[str]:
    """The keys are read in pieces of 64, first all at the same time, then one after the other."""
    held = attention_work.PIECE, attention_work.ROOM
    try:
        attention_work.PIECE = 64
        found = prefill_findings(a_pass("self_attn", 70, length=128))
        attention_work.ROOM = 0
        return found or prefill_findings(a_pass("self_attn", 70, length=128))
    finally:
        attention_work.PIECE, attention_work.ROOM = held


def experts() -> list[str]:
    chosen = case(routing("random", 40, 4, 24), residual=True)
    try:
        return too_far(output(chosen), *expected(chosen))
    except EmulatorError as error:
        return [f"memory: {error}"]


def sorting() -> list[str]:
    """The places of 600 pairs, which three programs count, one after the other, and their tiles."""
    ids = exact_rows(9, 600, 7).abs().argmax(1).int()
    ids[100:400] = 3
    sort = moe.Sort(ids[:, None], 7, 64, number_of_rows(ids), Poisoned(CPU))
    try:
        emulate(sort.work, batch=1)
    except EmulatorError as error:
        return [f"memory: {error}"]
    counts = ids.long().bincount(minlength=7)
    ends = [*counts.cumsum(0).tolist()]
    tiles = [
        (expert, first)
        for expert, (begin, end) in enumerate(pairwise([0, *ends]))
        for first in range(begin, end, 64)
    ]
    found: list[str] = []
    pairs = torch.arange(600, dtype=torch.int32)
    if sort.expert_first.tolist() != [0, *ends]:
        found.append("numbers: expert_first")
    if (
        list(zip(sort.tile_expert.tolist(), sort.tile_first.tolist(), strict=True))[: len(tiles)]
        != tiles
    ):
        found.append("numbers: tiles")
    if not sort.tile_expert[len(tiles) :].eq(7).all():
        found.append("numbers: unused tiles")
    if not torch.equal(sort.order.sort().values, pairs):
        found.append("numbers: order")
    elif not torch.equal(sort.order[sort.place_of_pair], pairs):
        found.append("numbers: places")
    elif not torch.equal(ids[sort.order], ids.sort().values):
        found.append("numbers: an expert's pairs")
    return found


def block() -> list[str]:
    slow, x = slow_block(16, 1024, 128, 4, 256), exact_rows(3, 20, 1024)
    work, out = moe.block(fast_block(slow), x, number_of_rows(x), Poisoned(CPU))
    try:
        emulate(work)
    except EmulatorError as error:
        return [f"memory: {error}"]
    return too_far(out, slow(x[None])[0], wide_block(slow, x.double()))


# ---- the faults

DELTA = "prefill/deltanet"
fault("a tap too late", DELTA, delta_net, "numbers",
      ("at = token - (TAPS - 1) + tap", "at = token - (TAPS - 1) + tl.maximum(tap, 1)"))  # fmt: skip
fault("rows before the pass left out", DELTA, delta_net, "numbers",
      ("if tl.program_id(0) == 0:", "if tl.program_id(0) < 0:"))  # fmt: skip
fault("queries not scaled", DELTA, delta_net, "numbers", ("K**-0.5, 1.0)", "1.0, 1.0)"))
fault("a triangular system solved in blocks alone", DELTA, equal_rows, "numbers",
      ("tl.range(1, DOUBLINGS)", "tl.range(1, DOUBLINGS - 2)"))  # fmt: skip
fault("a triangular system without the pairs of rows that it begins with", DELTA, equal_rows, "numbers",
      ("one - tl.where(i ^ j == 1, lower, 0.0)", "one"))  # fmt: skip
fault("a Newton step from a wrong residual", DELTA, equal_rows, "numbers",
      ("left = one - inverse - ", "left = one - "))  # fmt: skip
fault("a system without the decay between its tokens", DELTA, delta_net, "numbers",
      ("tl.trans(key)) * tl.exp(since)", "tl.trans(key))"))  # fmt: skip
fault(
    "keys not weakened by the decay",
    DELTA,
    delta_net,
    "numbers",
    ("(inverse * tl.exp(decay)[None, :])", "inverse"),
)
fault("a strength that is forgotten", DELTA, delta_net, "numbers",
      ("_inverse(tl.where(i > j, overlap, 0.0), i, j) * strength[None, :]",
       "_inverse(tl.where(i > j, overlap, 0.0), i, j)"))  # fmt: skip
fault("tiled instead of interleaved key heads", DELTA, delta_net, "numbers",
      ("place = qk + (line * (2 * H) + H + key_head) * K + column",
       "place = qk + (line * (2 * H) + H + head % H) * K + column"))  # fmt: skip
fault("a memory that does not decay", DELTA, delta_net, "numbers",
      ("memory * tl.exp(whole))", "memory)"))  # fmt: skip
fault("corrections that do not decay", DELTA, delta_net, "numbers",
      ("tl.exp(whole - since)[:, None]", "tl.exp(whole - whole)"))  # fmt: skip
fault("a query that sees its own chunk only before it", DELTA, delta_net, "numbers",
      ("inner = tl.where(i >= j,", "inner = tl.where(i > j,"))  # fmt: skip
fault("rows behind the last one not empty", DELTA, delta_net, "memory",
      ('tl.load(gates, mask=is_row, other=float("-inf"))', "tl.load(gates)"))  # fmt: skip
fault("a gate of another head", DELTA, delta_net, "numbers",
      ("line * M + C + head * V + v", "line * M + C + key_head * V + v"))  # fmt: skip

ATTENTION = "prefill/attention"
fault("a query that sees the next key", ATTENTION, attention, "numbers",
      ("p[None, :] <= position", "p[None, :] <= position + 1"))  # fmt: skip
fault("scores in powers of e", ATTENTION, attention, "numbers", (" * 1.4426950408889634", ""))
fault("a sum that does not fade", ATTENTION, attention, "numbers",
      ("total * fade + tl.sum", "total + tl.sum"))  # fmt: skip
fault("another head's keys", ATTENTION, attention, "numbers", ("(head // (H // G))", "(head % G)"))
fault("keys from the block's own first tile", ATTENTION, attention, "numbers",
      ("tl.range(begin, stop, TILE)", "tl.range(begin + TILE, stop, TILE)"))  # fmt: skip
fault("a tile's edge at the pass's first row", ATTENTION, attention_in_parts, "bits",
      ("for at in tl.range(begin, stop, TILE):\n        p = at + tile\n",
       "for at in tl.range(before % TILE - TILE + 8 * (before == 64), stop, TILE):\n"
       "        p = tl.maximum(at + tile, 0)\n"))  # fmt: skip
fault("a piece joined without its weight", ATTENTION, attention_in_pieces, "numbers",
      ("more * share[:, None]", "more"))  # fmt: skip
fault("a sum of powers joined without its weight", ATTENTION, attention_in_pieces, "numbers",
      ("total * fade + more_total * share", "total + more_total"))  # fmt: skip
fault("the first piece joined with what was there before", ATTENTION, attention_in_pieces, "unwritten",
      ("fresh = tl.where(first == 0, 1, 0)", "fresh = tl.where(first < 0, 1, 0)"))  # fmt: skip
fault("pieces behind a row's last one joined", ATTENTION, attention_in_pieces, "numbers unwritten",
      ("tl.minimum(tl.cdiv(end, PIECE) - first, pieces)", "pieces"))  # fmt: skip
fault("a piece with the next one's first keys", ATTENTION, attention_in_pieces, "numbers",
      ("tl.minimum(begin + PIECE, end)", "tl.minimum(begin + PIECE + TILE, end)"))  # fmt: skip

MOE = "prefill/moe"
fault("the next expert's weights", MOE, experts, "numbers",
      ("n = expert.to(tl.int64) * N +", "n = (expert.to(tl.int64) + 1) % E * N +"))  # fmt: skip
fault("the pair for its row", MOE, experts, "numbers",
      ("bounded(tl.load(order + line) // TOP_K,", "bounded(tl.load(order + line),"))  # fmt: skip
fault("gate and up exchanged", MOE, experts, "numbers",
      ("gate, up = acc.reshape(BLOCK_M, BLOCK_N // 2, 2).split()",
       "up, gate = acc.reshape(BLOCK_M, BLOCK_N // 2, 2).split()"))  # fmt: skip
fault("the places of other slots", MOE, experts, "numbers",
      ("place_of_pair + line * TOP_K + slot", "place_of_pair + line * TOP_K + slot // 2"))  # fmt: skip
fault("an expert's last tile forgotten", MOE, sorting, "numbers",
      ("needed = (held + TILE - 1) // TILE", "needed = held // TILE"))  # fmt: skip
fault("a tile that begins where the one before does", MOE, sorting, "numbers",
      ("first + i * TILE, mask", "first, mask"))  # fmt: skip
fault("tiles that nobody needs not marked", MOE, sorting, "numbers",
      ("tl.store(tile_expert + at, E,", "tl.store(tile_expert + at, 0,"))  # fmt: skip
fault("pairs placed without the experts before theirs", MOE, sorting, "numbers",
      ("bounded(first + tl.load(ranks", "bounded(tl.load(ranks"))  # fmt: skip
fault("pairs of one expert with the same rank", MOE, sorting, "numbers",
      ("tl.store(ranks + pair, rank,", "tl.store(ranks + pair, rank // 2,"))  # fmt: skip
fault("experts counted before all programs are done", MOE, sorting, "numbers",
      ("if before == tl.num_programs(0) - 1:", "if before == 0:"))  # fmt: skip
fault("an expert's last row forgotten", MOE, experts, "unwritten",
      ("tl.load(expert_first + expert + 1)", "tl.load(expert_first + expert + 1) - 1"))  # fmt: skip
fault("no residual", MOE, experts, "numbers", ("    if HAS_RESIDUAL:", "    if False:"))
fault("a shared expert that is always open", MOE, block, "numbers",
      ("total += opened * tl.load(shared", "total += tl.load(shared"))  # fmt: skip
fault("ups for gates in the shared expert", MOE, block, "numbers",
      ("tl.load(gates + I, mask", "tl.load(gates, mask"))  # fmt: skip

LINEAR = "prefill/linear"
fault("the end of a row left out", LINEAR, delta_net, "numbers",
      ("offset in tl.range(0, K, BLOCK_K)", "offset in tl.range(0, K // 2, BLOCK_K)"))  # fmt: skip
fault("blocks of columns beyond the last one", LINEAR, delta_net, "memory",
      ("inside = (line < rows) & (n[None, :] < N)", "inside = line < rows"))  # fmt: skip


test_a_fault_is_found, test_without_a_fault_nothing_is_found = as_tests(FAULTS, __name__)
