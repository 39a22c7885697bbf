"""The compiler's text assembly for AMD cards, as data: one kernel's instructions, labels and resources.

Reads what LLVM prints: `k.asm["amdgcn"]` of a compiled Triton kernel, or the output of `clang -S`.
"""

import re
from dataclasses import dataclass, field
from itertools import pairwise

from qwen35.errors import InputError

# Modifiers that are a word alone. All others are written `name:value`; any other word is an operand.
FLAGS = frozenset(
    [
        "clamp",
        "gds",
        "glc",
        "idxen",
        "lds",
        "nt",
        "offen",
        "row_half_mirror",
        "row_mirror",
        "sc0",
        "sc1",
        "slc",
    ]
)

# Name in `Program.resources` -> its name in the assembly's metadata.
_METADATA = {
    "vgpr": ".vgpr_count",
    "agpr": ".agpr_count",
    "sgpr": ".sgpr_count",
    "vgpr_spills": ".vgpr_spill_count",
    "sgpr_spills": ".sgpr_spill_count",
    "scratch": ".private_segment_fixed_size",
}

_JUMPS = ("s_branch", "s_cbranch")
_LABEL = re.compile(r"([A-Za-z_.$][\w.$@]*):")
_CODE = re.compile(r"\s+([a-z]\w*)\b(.*)")


class EmulatorError(InputError):
    """A kernel does something that the emulator or the card cannot do. The message quotes the line, if a
    single instruction is at fault."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: `v_add_u32_e32 v0, 1, v1` has the operands ("v0", "1", "v1"), as they are written.

    modifiers: the words after the operands. A flag such as `offen` is True, any other has its text:
    `offset:16` is {"offset": "16"}, `op_sel:[1,0,0]` is {"op_sel": "[1,0,0]"}. line: the source line
    without its comment. number: the line's in the file, from 1 on.
    """

    mnemonic: str
    operands: tuple[str, ...]
    modifiers: dict[str, str | bool]
    line: str
    number: int


@dataclass(frozen=True)
class Parameter:
    """One entry of the kernel's argument buffer, in bytes; kind: LLVM's `.value_kind`."""

    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class Program:
    """One kernel.

    labels: label -> index into instructions; for a label at the end, their number. directives: the
    integer `.amdhsa_*` values, without that prefix. resources: vgpr, agpr, sgpr, vgpr_spills,
    sgpr_spills, scratch (bytes a lane) and code_bytes, those of them that the text has. parameters: in
    order.
    """

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    directives: dict[str, int]
    resources: dict[str, int]
    parameters: tuple[Parameter, ...] = field(default=())


def parse(text: str, name: str) -> Program:
    """The kernel `name` of an assembly file. EmulatorError if the file has no kernel of that name."""
    lines = text.splitlines()
    try:
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
    except StopIteration:
        raise EmulatorError(f"{name}: the assembly has no such label") from None
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for number, line in enumerate(lines[start:], start + 1):
        line = re.sub(r"(;|//).*", "", line).rstrip()
        if label := _LABEL.match(line):
            if label[1].startswith(".Lfunc_end"):
                break
            labels[label[1]] = len(instructions)
        elif code := _CODE.match(line):
            operands, modifiers = _split(code[2])
            instructions.append(Instruction(code[1], operands, modifiers, line.strip(), number))
    if not instructions:
        raise EmulatorError(f"{name}: the assembly has no instructions after this label")
    metadata = _metadata(text, name)
    resources = {
        ours: int(found[1])
        for ours, theirs in _METADATA.items()
        if (found := re.search(rf"{re.escape(theirs)}:\s*(\d+)", metadata))
    }
    if size := re.search(r"; codeLenInByte = (\d+)", "\n".join(lines[start:])):
        resources["code_bytes"] = int(size[1])
    return Program(
        name, tuple(instructions), labels, _directives(text, name), resources, _parameters(metadata)
    )


def hot_loop(program: Program) -> tuple[Instruction, ...]:
    """The instructions of the innermost loop that does the work, with its branch back; () if there is no
    loop. It is the loop with the most decodes of FP4, then with the most matrix products, then the
    longest.

    A loop is what a backward branch spans. An innermost loop contains no other loop.
    """
    spans: set[tuple[int, int]] = set()
    for i, instruction in enumerate(program.instructions):
        if not instruction.mnemonic.startswith(("s_branch", "s_cbranch")):
            continue
        target = program.labels.get(instruction.operands[0])
        if target is not None and target <= i:
            spans.add((target, i + 1))
    innermost = [
        (start, end)
        for start, end in spans
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in spans)
    ]
    if not innermost:
        return ()

    def work(span: tuple[int, int]) -> tuple[int, int, int, int]:
        names = [instruction.mnemonic for instruction in program.instructions[slice(*span)]]
        decodes = sum(bool(re.match(r"v_cvt_scalef32_pk_\w+_fp4", name)) for name in names)
        return decodes, sum("mfma" in name for name in names), span[1] - span[0], span[0]

    start, end = max(innermost, key=work)
    return program.instructions[start:end]


def hot_cycle(program: Program) -> tuple[tuple[Instruction, ...], ...]:
    """The blocks of the loop that does the work, loops in it included; () if there is none. A block is
    what lies between branches and their targets.

    It is what can be reached from the block with the most decodes of FP4 and from which that block can be
    reached, wherever the compiler has put it.
    """
    code, labels = program.instructions, program.labels
    ends = {i + 1 for i, one in enumerate(code) if one.mnemonic.startswith(_JUMPS)}
    starts = sorted({0, len(code)} | ends | set(labels.values()))
    blocks = dict(pairwise(starts))  # start -> end
    after: dict[int, set[int]] = {start: set() for start in blocks}
    before: dict[int, set[int]] = {start: set() for start in blocks}
    for start, end in blocks.items():
        last = code[end - 1]
        goes_on = last.mnemonic not in ("s_branch", "s_endpgm") and end in blocks
        there = {end} if goes_on else set()
        if last.mnemonic.startswith(_JUMPS) and labels.get(last.operands[0]) in blocks:
            there.add(labels[last.operands[0]])
        after[start] = there
        for one in there:
            before[one].add(start)

    def decodes(start: int) -> int:
        names = [one.mnemonic for one in code[start : blocks[start]]]
        return sum(bool(re.match(r"v_cvt_scalef32_pk_\w+_fp4", name)) for name in names)

    def reached(start: int, edges: dict[int, set[int]]) -> set[int]:
        found: set[int] = set()
        rest = [start]
        while rest:
            for one in edges[rest.pop()] - found:
                found.add(one)
                rest.append(one)
        return found

    hottest = max(blocks, key=decodes)
    cycle = reached(hottest, after) & reached(hottest, before)
    return tuple(code[start : blocks[start]] for start in sorted(cycle))


def _split(text: str) -> tuple[tuple[str, ...], dict[str, str | bool]]:
    """The operands and modifiers of an instruction. Each ends at a comma or blank outside of brackets."""
    words: list[str] = []
    depth, word = 0, ""
    for character in text + " ":
        if depth == 0 and character in ", \t":
            if word:
                words.append(word)
            word = ""
            continue
        depth += (character in "[(") - (character in "])")
        word += character
    operands: list[str] = []
    modifiers: dict[str, str | bool] = {}
    for word in words:
        if word in FLAGS:
            modifiers[word] = True
        elif named := re.fullmatch(r"([a-z]\w*):(.+)", word):
            modifiers[named[1]] = named[2]
        elif word != "&":  # s_waitcnt may join its counters with it
            operands.append(word)
    return tuple(operands), modifiers


def _directives(text: str, name: str) -> dict[str, int]:
    """The `.amdhsa_*` values between `.amdhsa_kernel name` and its end, less those that are
    expressions."""
    block = re.search(rf"\.amdhsa_kernel {re.escape(name)}\n(.*?)\.end_amdhsa_kernel", text, re.S)
    if block is None:
        return {}
    pairs = re.findall(r"\.amdhsa_(\w+)\s+(-?\d+)\s*$", block[1], re.M)
    return {key: int(value) for key, value in pairs}


def _metadata(text: str, name: str) -> str:
    """The kernel's entry in the list `amdhsa.kernels` of the YAML at the end; "" if there is none."""
    _, _, kernels = text.partition("amdhsa.kernels:")
    for entry in re.split(r"^  - ", kernels, flags=re.M):
        if re.search(rf"^    \.name:\s*'?{re.escape(name)}'?\s*$", entry, re.M):
            return entry
    return ""


def _parameters(metadata: str) -> tuple[Parameter, ...]:
    """The list `.args` of a kernel's metadata."""
    entries = re.split(r"^      - ", metadata, flags=re.M)[1:]
    found: list[Parameter] = []
    for entry in entries:
        values = dict(re.findall(r"^\s*(\.\w+):\s*(\S+)", entry, re.M))
        if {".offset", ".size", ".value_kind"} <= values.keys():
            found.append(
                Parameter(int(values[".offset"]), int(values[".size"]), values[".value_kind"])
            )
    return tuple(found)
