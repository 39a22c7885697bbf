"""Planted faults in what only Hopper executes, the decoding of its order of MXFP4 words: the experts on a
card beside the reference. sm_90 code has no emulator, so a machine without a card skips this file."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("triton")

from fast.launch import Scratch, run
from fast.moe import Experts
from tests.support.fast_cases import case, expected, poison, routing, slow_experts, too_far
from tests.support.fast_faults import Faults, as_tests

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card")
FAULTS = Faults()
fault = FAULTS.add


def experts() -> list[str]:
    chosen, card = case(routing("overlapping", 4, 3, 24)), torch.device("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        node = Experts.from_reference(copy.deepcopy(slow_experts(24, 256, 128)).to(card))
        given = (chosen.x.to(card), chosen.experts.int().to(card), chosen.weights.to(card))
        launches, out = node.launches(*given, Scratch(card))
    poison(launches)
    run(launches, card)
    return too_far(out.cpu(), *expected(chosen))


fault(
    "signs of the first pair lost",
    "mxfp4",
    experts,
    "numbers",
    ("and.b32 pair, $4, 0x81C081C0;", "and.b32 pair, $4, 0x01C001C0;"),
)
fault(
    "a rotation by one bit more",
    "mxfp4",
    experts,
    "numbers unwritten",
    ("shf.l.wrap.b32 turned, $4, $4, 10;", "shf.l.wrap.b32 turned, $4, $4, 11;"),
)
fault(
    "the last pair without its lowest bit",
    "mxfp4",
    experts,
    "numbers",
    ("lop3.b32 pair, turned, 0x01000100, pair, 0xEA;", "lop3.b32 pair, turned, 0, pair, 0xEA;"),
)
fault(
    "second elements four further than the first ones",
    "mxfp4",
    experts,
    "numbers",
    ("tl.load(pointers + 8,", "tl.load(pointers + 4,"),
)
fault(
    "elements of a span in the order of a file",
    "mxfp4",
    experts,
    "numbers",
    (
        "byte // 64 * SPAN + byte // 8 % 2 * 64 + byte // 16 % 4 * 16 + byte % 8",
        "byte // 8 * 16 + byte % 8",
    ),
)
fault(
    "first and second elements exchanged",
    "mxfp4",
    experts,
    "numbers",
    (
        "tl.dot(high, second, tl.dot(low, first, acc))",
        "tl.dot(low, second, tl.dot(high, first, acc))",
    ),
)
fault(
    "scales of a span in the order of a file",
    "mxfp4",
    experts,
    "numbers",
    (
        "twice.reshape(BLOCK_N, SPANS, 2, 2).permute(0, 1, 3, 2)\n    by_word",
        "twice.reshape(BLOCK_N, SPANS, 2, 2)\n    by_word",
    ),
)

test_a_fault_is_found, test_without_a_fault_nothing_is_found = as_tests(FAULTS, __name__)
