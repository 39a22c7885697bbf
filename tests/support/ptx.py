"""Reads a kernel's PTX: which parameters it reads and writes, and what it does before it waits for the
launch before it (`griddepcontrol.wait`)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

WAIT = "griddepcontrol.wait"
LABEL = re.compile(r"(\$L\w+):")
BRANCH = re.compile(r"(@!?%p\d+ )?bra(?:\.uni)? (\$L\w+);")
REGISTER = re.compile(r"%rd\d+")  # 64 bits wide, as every address is
PARAMETER = re.compile(r"\[\w+_param_(\d+)\]")
GLOBAL = re.compile(r"(?:@!?%p\d+ )?(ld|st|atom|red|cp\.async)\.\S*global")


@dataclass(frozen=True)
class Access:
    """An instruction that reads or writes global memory. parameters: the pointers that its address may
    come from; none where that cannot be told."""

    line: str
    writes: bool
    parameters: frozenset[str]


def instructions(ptx: str) -> list[str]:
    """A kernel's instructions and labels, in order, with single spaces and without comments."""
    body = ptx[ptx.index("\n{") :]
    lines = (" ".join(line.partition("//")[0].split()) for line in body.splitlines())
    return [line for line in lines if LABEL.match(line) or (line.endswith(";") and line[0] != ".")]


def accesses(code: list[str], names: list[str]) -> dict[int, Access]:
    """The accesses to global memory by their place in the code. names: of the kernel's parameters.

    An address is a parameter with offsets added, however many registers it goes through; what is read
    from memory is taken to be an index, not an address.
    """
    origins: dict[str, frozenset[str]] = {}
    found: dict[int, frozenset[str]] = {}
    while True:
        before = dict(origins)
        for place, line in enumerate(code):
            registers = REGISTER.findall(line)
            if parameter := PARAMETER.search(line):
                number = int(parameter[1])  # two more than the kernel's own are Triton's
                sources = frozenset(names[number : number + 1])
            else:
                sources = frozenset().union(*(origins.get(r, frozenset()) for r in registers))
            if GLOBAL.match(line):
                found[place] = sources
            elif registers:
                origins[registers[0]] = origins.get(registers[0], frozenset()) | sources
        if origins == before:
            break
    return {
        place: Access(code[place], not GLOBAL.match(code[place])[1].startswith(("ld", "cp")), by)  # pyright: ignore
        for place, by in found.items()
    }


def written(ptx: str, names: list[str]) -> set[str]:
    """The parameters through which a kernel writes."""
    found = accesses(instructions(ptx), names).values()
    return {name for access in found if access.writes for name in access.parameters}


def before_the_wait(ptx: str, names: list[str]) -> Iterator[Access]:
    """The accesses of a kernel that some way through its branches reaches without having waited."""
    code = instructions(ptx)
    found = accesses(code, names)
    labels = {label[1]: place for place, line in enumerate(code) if (label := LABEL.match(line))}
    reached, todo = set[int](), [0]
    while todo:
        place = todo.pop()
        if place in reached or place == len(code) or code[place] == f"{WAIT};":
            continue
        reached.add(place)
        branch = BRANCH.fullmatch(code[place])
        if branch:
            todo.append(labels[branch[2]])
        if code[place] != "ret;" and (branch is None or branch[1]):
            todo.append(place + 1)
    return (found[place] for place in sorted(reached & found.keys()))


def without(ptx: str, number: int) -> str:
    """The same text without its wait of this number, from 0 on."""
    parts = ptx.split(WAIT)
    return WAIT.join(parts[: number + 1]) + "// " + WAIT.join(parts[number + 1 :])
