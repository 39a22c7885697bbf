"""The faults of `test_mxfp4.py`, in the decoding of Hopper's order of MXFP4 words, once more in the code
that a card executes: the experts beside the reference. A machine without a card skips this file."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("triton")

from fast.launch import Scratch, run
from fast.moe import Experts
from tests.fast import test_mxfp4
from tests.support.fast_cases import case, expected, poison, routing, slow_experts, too_far
from tests.support.fast_faults import Faults, as_tests

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card")
FAULTS = Faults()
CARD = torch.device("cuda")


def node() -> Experts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Experts.from_reference(copy.deepcopy(slow_experts(24, 256, 128)).to(CARD))


def few_rows() -> list[str]:
    chosen = case(routing("overlapping", 4, 3, 24))
    given = (chosen.x.to(CARD), chosen.experts.int().to(CARD), chosen.weights.to(CARD))
    launches, out = node().launches(*given, Scratch(CARD))
    poison(launches)
    run(launches, CARD)
    return too_far(out.cpu(), *expected(chosen))


def many_rows() -> list[str]:
    chosen = case(routing("random", 40, 4, 24))
    out = node()(chosen.x.to(CARD), chosen.experts.to(CARD), chosen.weights.to(CARD))
    return too_far(out.cpu(), *expected(chosen))


for name, what in test_mxfp4.FAULTS.items():
    check = few_rows if what.check is test_mxfp4.few_rows else many_rows
    FAULTS.add(name, what.module, check, "numbers unwritten", *what.edits)

test_a_fault_is_found, test_without_a_fault_nothing_is_found = as_tests(FAULTS, __name__)
