"""`python -m tests.support.fault_kinds`: lists all faults that are planted in kernels, in compiled
assembly and in the emulator, by kind.

Each fault has a test, whose name is printed. A fault that is in no list of KINDS is one of the
computation: a formula, a head or a constant is wrong.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from qwen35.cli import Parser, run
from tests.fast import (
    test_faults,
    test_faults_compiled,
    test_faults_hip,
    test_faults_kinds,
    test_faults_mixers,
    test_faults_router_hip,
    test_mxfp4,
)
from tests.fast.prefill import test_faults as test_faults_prefill
from tests.tools.gfx950 import test_faults as test_faults_emulator
from tests.tools.gfx950 import test_faults_assembly

COMPUTED = "what is computed"
# The modules with the FAULTS that are planted in each place.
PLACES = {
    "Triton": (test_faults, test_faults_mixers, test_faults_prefill, test_faults_kinds, test_mxfp4),
    "HIP": (test_faults_hip, test_faults_router_hip),
    "assembly": (test_faults_compiled, test_faults_assembly),
    "emulator": (test_faults_emulator,),
}
KINDS: dict[str, tuple[str, ...]] = {
    "index width": (
        "an expert's offset of 32 bits",
        "a row's offset in down of 32 bits",
        "a product's offset of 32 bits",
        "a prompt's row of 32 bits",
        "a prompt's weight of 32 bits",
        "a prompt's output of 32 bits",
        "a prompt's pair of 32 bits",
        "an expert of a prompt's pair of 32 bits",
        "carry ignored",
    ),
    "masks": (
        "hidden rows stored without a mask",
        "rows read without a mask",
        "rows read without a mask in bf16",
        "output rows stored without a mask",
        "the residual read without a mask",
        "parts of the router stored without a mask of rows",
        "parts of the router stored without a mask of columns",
        "the choice stored for slots that are not there",
        "a product's rows read without a mask",
        "experts that are not there share in the softmax",
        "ids of no expert taken for the nearest one",
        "ids above all experts taken for the last one",
        "a row sees the rows behind it",
        "a query that sees the next key",
        "a query that sees its own chunk only before it",
        "keys behind the last one",
        "rows of x that are not there are read",
        "sums stored for columns that are not there",
        "sums stored for rows that are not there",
        "exec ignored",
        "DPP masks ignored",
        "buffer bounds ignored",
    ),
    "barriers": (
        "one barrier too few in a workgroup without down tasks",
        "one barrier too few before the sums are added",
        "one barrier too few before the choice",
        "one buffer of sums instead of two",
        "one buffer of hidden rows instead of two",
        "barrier releases nothing",
    ),
    "waits": (
        "the counter raised before all waves have stored",
        "a counter raised before the stores are done",
        "data read as it was cached before the wait",
        "a barrier that waits for the weights to come",
        "the sums' counter raised before the stores are done",
        "sums read as they were cached before the count",
        "a streamer waits for each load",
    ),
    "order of sums": (
        "the sum begins with the slot that arrives last",
        "the sum over the slots begins with the number of rows",
        "each row begins its sum with another slot",
        "gate and up summed from the other end where there are several rows",
        "a product summed from the other end where there are several rows",
        "a tile's edge at the pass's first row",
        "slots added in an order that depends on the rows",
        "slots added in an order that depends on the workgroup",
        "streamers summed in an order that depends on the rows",
    ),
    "scale groups": (
        "the scale of the neighbouring group",
        "the scales of the row below",
        "the scale of down's neighbouring group",
        "gate and up with the scales of the first block alone",
        "down with the scales of the first block alone",
        "down with the scales of the row below",
        "the scale of the neighbouring group in a prompt's experts",
        "keys without their scales",
        "values without their scales",
        "the scale of another position",
        "scales of a span in the order of a file",
        "scales of a prompt's words in another order",
        "the scales of a prompt's first span alone",
        "a scale so large that small numbers lose bits",
        "a scale so small that large numbers have no e4m3",
        "new values without their scale",
        "e8m0 bias 126",
        "scale byte ignored",
        "scales swapped",
    ),
    "nibbles": (
        "high nibble first",
        "both elements of a byte the first one",
        "signs of the elements dropped",
        "bytes of gate and up in pairs exchanged",
        "bytes of down in pairs exchanged",
        "bytes of codes in another order",
        "high nibble first in a prompt's experts",
        "signs of the first pair lost",
        "a rotation by one bit more",
        "the last pair without its lowest bit",
        "nibbles swapped",
        "op_sel ignored",
    ),
    "rows beyond": (
        "rows of the weight read beyond its end",
        "rows behind the last one not empty",
        "blocks of columns beyond the last one",
        "an expert's last row forgotten",
        "only four rows are chosen for",
        "the choice stored for rows that are not there",
        "the shared expert's columns read beyond their end",
        "queries of rows that are not there",
        "rows before position 0 taken from the ring",
        "rows before the pass left out",
        "columns read beyond the end of a row",
        "rows of x that are not there in a product of words",
        "nobody chooses for the last rows",
        "only the first 64 pairs get their shares",
    ),
    "counters": (
        "experts counted before all programs are done",
        "the counter not set back",
        "added up too early",
        "the router chooses too early",
        "the router's counter not set back",
        "the delta net's counter not set back",
        "an arrival counted twice",
        "one counter for all blocks of columns",
        "each block of columns sets back the first one's counter",
        "the router counts a program twice",
        "the router's counter set back to one",
        "the delta net's heads share a counter",
        "down starts when all but one block of gate-up are there",
        "down does not wait",
        "the sum starts when all but one expert are there",
        "the sum waits for the columns of another block",
        "counters used again: the epoch is not counted",
        "counters used again: nobody arrives for experts that are not in the list",
        "the shares of experts that are not in the list are not counted",
        "a deadlock: waits for a task that it has not published",
        "a deadlock: waits for one block more than there are",
        "a deadlock: the last down task of a workgroup is not published",
        "counters used again: the count of the first launch alone",
        "one workgroup more waited for than there are",
        "a workgroup counted twice",
    ),
    "registers and LDS not written": (),
}


@dataclass(frozen=True)
class Planted:
    """A fault: its kind, where it is planted, its name, and the test that sees it."""

    kind: str
    place: str
    name: str
    test: str


def planted() -> Iterator[Planted]:
    by_name = {name: kind for kind, names in KINDS.items() for name in names}
    for place, modules in PLACES.items():
        for module in modules:
            path = f"tests/{module.__name__.removeprefix('tests.').replace('.', '/')}.py"
            function = next(name for name in vars(module) if name.startswith("test_a_"))
            for name, what in module.FAULTS.items():
                kind = by_name.get(name, COMPUTED)
                if module in PLACES["assembly"]:
                    kind = what.kind
                yield Planted(kind, place, name, f"{path}::{function}[{name}]")


def build_parser() -> Parser:
    name = "python -m tests.support.fault_kinds"
    return Parser(name, "Each planted fault's kind, and the test that sees it.", computes=False)


def main(args: argparse.Namespace) -> int:
    for one in sorted(planted(), key=lambda what: (what.kind, what.test)):
        print(f"{one.kind}: {one.test}")
    return 0


if __name__ == "__main__":
    run(build_parser(), main)
