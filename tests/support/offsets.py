"""Bounds of the offsets that a Triton kernel adds to its pointers, read from its IR. They have 32 bits
unless the source widens them, and nothing tells of an overflow."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from fast.launch import Launch
from tools.gfx950.target import stand_in_driver

# The smallest and the largest value; None where it cannot be told.
Interval = tuple[int, int] | None
LIMIT = 1 << 31
LOCATION = re.compile(r" loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
DEFINED = re.compile(r'\s*(%\w+) = "?([\w.]+)"? ?(.*)')
LOOP = re.compile(r"scf\.for (%\w+) = (%\w+) to (%\w+)")
AXES = {"x": 0, "y": 1, "z": 2}
COPIES = (
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi", "arith.trunci",
)  # fmt: skip
EXACT: dict[str, Callable[[int, int], int]] = {
    "arith.addi": lambda x, y: x + y,
    "arith.subi": lambda x, y: x - y,
    "arith.muli": lambda x, y: x * y,
    "arith.divsi": lambda x, y: -(-x // y) if x < 0 else x // y,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.select": lambda x, y: x,
    "arith.shli": lambda x, y: x << min(y, 64) if y >= 0 else x,
    "arith.shrsi": lambda x, y: x >> min(y, 64) if y >= 0 else x,
}


def ttir(launch: Launch, target: str) -> str:
    """The IR of a kernel with what it calls, specialised for the launch as the JIT does it."""
    from triton import knobs
    from triton._C.libtriton import ir
    from triton.compiler import ASTSource, make_backend
    from triton.runtime import driver

    found: list[str] = []

    def instead(*, fn: Any, compile: Any, **_: Any) -> bool:
        """Called before a kernel is compiled, which it then is not."""
        device: Any = driver.active.get_current_target()
        backend, context, stages = make_backend(device), ir.context(), {}
        options = backend.parse_options(dict(launch.options))
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(
            fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0]
        )
        functions = backend.get_codegen_implementation(options), backend.get_module_map()
        module = source.make_ir(device, options, *functions, context)
        backend.add_stages(stages, options, source.language)
        found.append(str(stages["ttir"](module, {})))
        return True

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, instead  # pyright: ignore
    # The hook is not called for what another test has compiled in this process.
    kernel = launch.kernel
    compiled, kernel.device_caches = kernel.device_caches, defaultdict(kernel.create_binder)
    try:
        with stand_in_driver(target):
            kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
    finally:
        knobs.runtime.jit_cache_hook, kernel.device_caches = before, compiled
    return found[0]


def overflows(
    text: str, launch: Launch, loaded: Mapping[str, tuple[int, int]]
) -> list[tuple[str, str]]:
    """The offsets that may come from a number of 32 bits that has wrapped, and those of 32 bits of which
    nothing is known: the parameter of the pointer that moves by one, and the line.

    loaded: bounds of the integers in a tensor, by parameter; a kernel that limits what it has read needs
    none. Lanes that a mask turns off count as well.
    """
    lines = LOCATION.sub("", text).splitlines()
    header = next(line for line in lines if "tt.func" in line)
    bases = {f"%{name}": name for name in re.findall(r"%(\w+): !tt.ptr", header)}
    numbers = {f"%{name}": launch.arguments[name] for name in re.findall(r"%(\w+): i\d+", header)}
    known: dict[str, Interval] = {name: (value, value) for name, value in numbers.items()}
    wrapped: set[str] = set()
    bad: list[tuple[str, str]] = []
    for line in lines:
        if loop := LOOP.search(line):
            low, high = known.get(loop[2]), known.get(loop[3])
            known[loop[1]] = (low[0], max(low[0], high[1] - 1)) if low and high else None
        found = DEFINED.match(line)
        if not found:
            continue
        name, operation, rest = found.groups()
        names = re.findall(r"%\w+", rest.rpartition(" : ")[0])
        if names and names[0] in bases and operation in ("tt.addptr", "tt.bitcast", *COPIES):
            bases[name] = bases[names[0]]
        if operation == "tt.addptr":
            is_unknown = known.get(names[1]) is None and re.search(r"i32>?$", rest)
            if names[1] in wrapped or is_unknown:
                bad.append((bases[name], line.strip()))
        elif operation == "tt.load":
            known[name] = loaded.get(bases[names[0]])
        elif operation not in ("arith.cmpi", "scf.for", "scf.if"):
            of = names[1:] if operation == "arith.select" else names
            bound = _bound(operation, rest, [known.get(operand) for operand in of], launch.grid)
            is_narrow = re.search(r"(?:^|x| )i32>?$", rest)
            if is_narrow and bound and not -LIMIT <= bound[0] <= bound[1] < LIMIT:
                wrapped.add(name)
                bound = None
            if wrapped.intersection(of):
                wrapped.add(name)
            known[name] = bound
    return bad


def _bound(operation: str, rest: str, of: list[Interval], grid: tuple[int, int, int]) -> Interval:
    """The bounds of a result, from those of the operands."""
    if operation == "arith.constant":
        number = re.match(r"(?:dense<)?(-?\d+)>? : (?:tensor<[\dx]*)?i\d+", rest)
        return (int(number[1]), int(number[1])) if number else None
    if operation == "tt.make_range":
        end, start = (int(n) for n in re.findall(r"= (\d+) : i32", rest))
        return start, end - 1
    if operation in ("tt.get_program_id", "tt.get_num_programs"):
        count = grid[AXES[rest[0]]]
        return (0, count - 1) if operation == "tt.get_program_id" else (count, count)
    if (
        operation in ("arith.minsi", "arith.maxsi")
        and len(of) == 2
        and (of[0] is None) != (of[1] is None)
    ):
        one = of[0] or of[1]
        assert one
        return (-LIMIT, one[1]) if operation == "arith.minsi" else (one[0], LIMIT - 1)
    if operation == "arith.andi" and any(one and one[0] == one[1] >= 0 for one in of):
        return 0, min(one[1] for one in of if one and one[0] == one[1] >= 0)
    if not of or any(one is None for one in of):
        return None
    sides = [one for one in of if one]
    if operation in COPIES:
        return sides[0]
    if len(sides) != 2 or operation not in (*EXACT, "arith.remsi"):
        return None
    (a, b), (c, d) = sides
    if operation in ("arith.divsi", "arith.remsi") and not (c == d > 0):
        return None
    if operation == "arith.remsi":
        return (0, min(b, c - 1)) if a >= 0 else (1 - c, c - 1)
    ends = [EXACT[operation](x, y) for x in (a, b) for y in (c, d)]
    return min(ends), max(ends)
