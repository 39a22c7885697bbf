"""`python -m tools.compile`: compile every kernel without a GPU, and report what came out.

The targets are gfx950 (MI355X) and sm_90 (H100, H200). Neither a GPU nor a driver is needed.
--check compares the result with the committed table, compile.json. --kernel compiles your own
launches instead (docs/write-a-kernel.md), and --hip the HIP kernels. The columns of the table are:

vgpr: vector registers per lane (sm_90: registers per thread). agpr of them are for accumulation.
scratch: bytes of scratch memory per lane. lds: bytes of shared memory per program.
occupancy: how many waves a SIMD can hold (sm_90: how many warps a scheduler can hold).
code_bytes: bytes of instructions.
fp4_converts: number of native FP4 conversions.
scaled_mfma, mfma, wgmma, mma: numbers of matrix products. Only scaled_mfma has block scales.
wide_loads, narrow_loads: numbers of memory loads of 16 bytes per lane, and of fewer. They count the
hot loop, or the whole kernel if it has no loop, and always the whole kernel for sm_90.
loop_bytes: bytes that one iteration of the hot loop loads for a program, activations included.
weight_bytes_per_valu: weight bytes that a wave loads per vector instruction of the hot loop, not
counting matrix products. On an MI355X a kernel needs 13 to keep up with the memory:
8 TB/s / (256 CUs x 4 SIMDs x 2.4 GHz / 4 cycles).

One pass of the loop in the assembly counts as one iteration of the source (`Launch.weight_bytes`).
If the compiler unrolls the loop in part, weight_bytes_per_valu is too low, and never too high. The
reason is that the loaded bytes do not say whether they are weights or activations. The figure is
left out if no loop remains, or if the hot loop loads fewer bytes than weight_bytes, because then it
is another loop.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fast import hip_compiler
from fast.launch import Launch
from qwen35.cli import Parser, output_folder, print_json, run
from qwen35.errors import InputError
from qwen35.load import lay_out
from qwen35.paths import unfit_triton
from qwen35.progress import steps
from tools.cards import occupancy_gfx950, occupancy_sm90
from tools.gfx950.assembly import Instruction, hot_cycle, hot_loop, parse
from tools.kernel_file import launches_of
from tools.table import aligned
from weights.storage import write_whole

TARGETS = {"gfx950": "s", "sm_90": "sass"}  # target: suffix of its assembly files
TABLE = Path(__file__).with_suffix(".json")
PROCESSES = 2
BYTES_PER_VALU = 13  # the minimum; the module docstring derives it
UPDATE = "python -m tools.compile --update"
# Columns that are compared with the table, each with the relative loss that is tolerated.
COMPARED = {"occupancy": 0.0, "wide_loads": 0.0, "weight_bytes_per_valu": 0.02}
SPILLS = {
    "vgpr_spills": "vector registers spilled",
    "sgpr_spills": "scalar registers spilled",
    "scratch": "bytes of scratch",
}

LANES = 64
LOAD = re.compile(r"(?:buffer|global|flat)_load_(?:lds_)?(dword(?:x[234])?|[us]byte|[us]?short)")
FP4_CONVERT = r"v_cvt_scalef32_pk_\w+_fp4"
SCALAR_LOAD = re.compile(r"s_(?:buffer_)?load_dword(?:x(\d+))?$")
BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ubyte": 1, "sbyte": 1}
SASS = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)")

Row = dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """The outcome of one launch. row: its row of the table, or None if the compiler raised `error`.
    assembly: the text of the machine instructions."""

    name: str
    target: str
    row: Row | None
    assembly: str = ""
    error: str = ""


def build_parser() -> Parser:
    parser = Parser(
        "python -m tools.compile",
        "Compile every kernel without a GPU, and print a table of registers, spills and the instructions "
        "that matter.",
        computes=False,
    )
    parser.add_argument(
        "--target", nargs="+", choices=TARGETS, default=list(TARGETS),
        help="compile for these cards: gfx950 is an MI355X, sm_90 an H200 (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--kernel", metavar="FILE:NAME",
        help="compile the launches that the function NAME of a Python file gives for a target, instead "
        "of the project's kernels; --check then exits with 1 if one has spills or scratch memory, or "
        f"reads fewer than {BYTES_PER_VALU} bytes of weights per vector instruction",
    )  # fmt: skip
    parser.add_argument(
        "--hip", action="store_true",
        help="compile the HIP kernels, and Triton's for the same work, for gfx950; --check as with "
        "--kernel",
    )  # fmt: skip
    parser.add_argument("--match", metavar="GLOB", default="*",
        help="compile only the kernels whose names fit GLOB (default: *, all)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--asm", type=output_folder, metavar="DIR",
        help="write the assembly of each kernel into DIR, which is made if it is not there")  # fmt: skip
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true",
        help=f"compare the kernels with {TABLE.name}, and exit with 1 if one is worse")  # fmt: skip
    group.add_argument("--update", action="store_true", help=f"write the table into {TABLE.name}")
    return parser


def compile_all(jobs: list[tuple[Launch, str]]) -> list[Compiled]:
    """Compile (launch, target) pairs in forked processes. They inherit the launches, because
    kernels cannot be pickled. InputError if a compiler crashes."""
    pool = ProcessPoolExecutor(PROCESSES, get_context("fork"), _inherit, (jobs,))
    try:
        with pool:
            found = pool.map(_compile_job, range(len(jobs)))  # forks before any thread is started
            return list(steps(found, "kernels", len(jobs)))
    except BrokenProcessPool:
        raise InputError("the compiler crashed; --match tells at which kernel") from None


_jobs: list[tuple[Launch, str]] = []


def _inherit(jobs: list[tuple[Launch, str]]) -> None:
    _jobs[:] = jobs
    os.dup2(2, 1)  # keep what compilers print out of the table


def _compile_job(index: int) -> Compiled:
    return _compile(*_jobs[index])


def _compile(launch: Launch, target: str) -> Compiled:
    from tools.gfx950.target import compile_launch

    try:
        compiled = compile_launch(launch, target)
        describe = _describe_gfx950 if target == "gfx950" else _describe_sm90
        figures, assembly = describe(launch, compiled)
    except Exception as error:  # a compiler may raise any type; the other kernels go on
        message = " ".join(str(error).split()) or "no message"
        return Compiled(launch.name, target, None, error=f"{type(error).__name__}: {message}")
    return Compiled(
        launch.name, target, {"name": launch.name, "target": target} | figures, assembly
    )


def _describe_gfx950(launch: Launch, compiled: Any) -> tuple[Row, str]:
    program = parse(compiled.text, compiled.name)
    resources = program.resources
    blocks: tuple[tuple[Instruction, ...], ...] = ()
    if launch.alternatives:
        blocks = hot_cycle(program) if launch.alternatives > 1 else (hot_loop(program),)
    loop = [instruction for block in blocks for instruction in block]
    mnemonics = [instruction.mnemonic for instruction in program.instructions]
    widths = [lane_bytes(instruction) for instruction in loop or program.instructions]
    valu = _valu(blocks, launch.alternatives)
    lds = compiled.shared + program.directives.get("group_segment_fixed_size", 0)
    loop_bytes = compiled.num_warps * sum(map(wave_bytes, loop))
    per_valu = None
    if valu and 0 < launch.weight_bytes <= loop_bytes:
        per_valu = round(launch.alternatives * launch.bytes_of_a_wave(compiled.num_warps) / valu, 2)
    row = {
        **{
            name: resources[name]
            for name in ("vgpr", "agpr", "sgpr", "vgpr_spills", "sgpr_spills", "scratch")
        },
        "lds": lds,
        "occupancy": occupancy_gfx950(resources["vgpr"], lds, compiled.num_warps),
        "code_bytes": resources["code_bytes"],
        "weight_bytes_per_valu": per_valu,
        "weight_bytes": launch.weight_bytes,
        "loop_bytes": loop_bytes,
        "fp4_converts": _count(FP4_CONVERT, mnemonics),
        "scaled_mfma": _count(r"v_mfma_scale_\w+", mnemonics),
        "mfma": _count(r"v_mfma_(?!scale_)\w+", mnemonics),
        "wide_loads": sum(width == 16 for width in widths),
        "narrow_loads": sum(0 < width < 16 for width in widths),
    }
    return row, compiled.text


def _valu(blocks: tuple[tuple[Instruction, ...], ...], alternatives: int) -> int:
    """How many vector instructions a wave executes in `alternatives` passes of a loop, each of which
    takes another alternative. The alternatives are the blocks that decode FP4; every pass executes
    the other blocks."""
    total = 0
    for block in blocks:
        names = [instruction.mnemonic for instruction in block]
        times = 1 if _count(FP4_CONVERT, names) else alternatives
        total += times * sum(map(is_valu, names))
    return total


def is_valu(mnemonic: str) -> bool:
    return mnemonic.startswith("v_") and not mnemonic.startswith(("v_mfma_", "v_smfmac_"))


def lane_bytes(instruction: Instruction) -> int:
    """Bytes that a memory load brings to a lane. 0 for other instructions and for scalar loads."""
    found = LOAD.match(instruction.mnemonic)
    return BYTES.get(found[1], 2) if found else 0


def wave_bytes(instruction: Instruction) -> int:
    if found := SCALAR_LOAD.match(instruction.mnemonic):
        return 4 * int(found[1] or 1)
    return LANES * lane_bytes(instruction)


def _count(pattern: str, mnemonics: list[str]) -> int:
    """Number of mnemonics that begin with the pattern. An encoding suffix may follow the name."""
    return sum(bool(re.match(pattern, mnemonic)) for mnemonic in mnemonics)


def _describe_sm90(launch: Launch, compiled: Any) -> tuple[Row, str]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.binary)
        cubin.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name)
        assembly = _output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", cubin.name)
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if used is None:
        raise InputError(f"cuobjdump -res-usage says {usage!r}")
    registers, stack = int(used[1]), int(used[2])
    opcodes = [found[1] for line in assembly.splitlines() if (found := SASS.match(line))]
    loads, wide = r"LDG(STS)?\b", r"LDG(STS)?\b.*\.128\b"
    row = {
        "vgpr": registers,
        "agpr": None,
        "sgpr": None,
        "vgpr_spills": _count(r"STL\b", opcodes),
        "sgpr_spills": None,
        "scratch": stack,
        "lds": compiled.shared,
        "occupancy": occupancy_sm90(registers, compiled.shared, compiled.num_warps),
        "code_bytes": 16 * len(opcodes),
        "weight_bytes_per_valu": None,
        "wgmma": _count(r"[A-Z]GMMA\b", opcodes),
        "mma": _count(r"[A-Z]MMA\b", opcodes),
        "wide_loads": _count(wide, opcodes),
        "narrow_loads": _count(loads, opcodes) - _count(wide, opcodes),
    }
    return row, assembly


def _output(*command: str) -> str:
    """Standard output of one of the programs that Triton ships."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def faults(row: Row) -> list[str]:
    """Faults that no kernel may have, whether or not the table records them."""
    found = [f"{row[name]} {unit}" for name, unit in SPILLS.items() if row[name]]
    figure = row["weight_bytes_per_valu"]
    if figure is not None and figure < BYTES_PER_VALU:
        found.append(f"weight_bytes_per_valu {figure}, less than {BYTES_PER_VALU}")
    return found


def lost(row: Row, old: Row) -> list[str]:
    """Kinds of native instructions that the kernel no longer has. Triton then emulates them with
    others."""
    names = ("fp4_converts", "scaled_mfma", "mfma", "wgmma", "mma")
    return [f"{name} {old[name]} -> 0" for name in names if old.get(name) and not row.get(name)]


def compare(row: Row, old: Row) -> tuple[list[str], list[str]]:
    """Lines on what is worse than recorded, without what `lost` reports, and lines on what is
    better."""
    worse: list[str] = []
    better: list[str] = []
    for name, tolerance in COMPARED.items():
        was, now = old[name], row[name]
        if was is None or was == now:
            continue
        line = f"{name} {was} -> {now}"
        if name == "occupancy":
            causes = [cause for cause in ("vgpr", "lds") if old[cause] != row[cause]]
            line += "".join(f", {cause} {old[cause]} -> {row[cause]}" for cause in causes)
        if now is None or now < was * (1 - tolerance):
            worse.append(line)
        elif now > was * (1 + tolerance):
            better.append(line)
    for name in SPILLS:
        if old[name] and not row[name]:
            better.append(f"{name} {old[name]} -> 0")
    return worse, better


def check(
    found: list[Compiled], table: dict[str, Any], version: str, wanted: Callable[[str, str], bool]
) -> tuple[list[str], list[str]]:
    """Lines on what is worse than in the table, and on what is better.

    wanted: whether this run covers a kernel (by name) and a target. If the table is of another
    Triton version, only faults and lost native instructions are reported.
    """
    recorded = {(row["name"], row["target"]): row for row in table["kernels"]}
    worse: list[str] = []
    better: list[str] = []
    for one in found:
        old, good = recorded.pop((one.name, one.target), None), []
        if one.row is None:
            continue
        bad = faults(one.row)
        if old is None:
            bad.append(f"not in {TABLE.name}; {UPDATE} adds it")
        else:
            bad += lost(one.row, old)
            if table["triton"] == version:
                changed, good = compare(one.row, old)
                bad += changed
        worse += [f"{one.name} {one.target}: {line}" for line in bad]
        better += [f"{one.name} {one.target}: {line}" for line in good]
    worse += [
        f"{name} {target}: in {TABLE.name}, but there is no such kernel; {UPDATE} removes it"
        for name, target in recorded
        if wanted(name, target)
    ]
    return worse, better


def read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        keys = [(row["name"], row["target"]) for row in table["kernels"]]
        columns = {"vgpr", "lds", *COMPARED, *SPILLS}
        is_table = isinstance(table["triton"], str) and len(set(keys)) == len(keys)
        if not (is_table and all(columns <= row.keys() for row in table["kernels"])):
            raise ValueError
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {UPDATE} writes it") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is no table of compiled kernels; {UPDATE} writes one") from None
    return table


def write_table(path: Path, rows: list[Row], version: str) -> None:
    """Write one line per row, so that git diff is readable. The file is replaced atomically."""
    ordered = sorted(rows, key=lambda row: (row["name"], row["target"]))
    lines = ",\n".join(json.dumps(row) for row in ordered)
    text = f'{{"triton": {json.dumps(version)}, "kernels": [\n{lines}\n]}}\n'
    write_whole(path, text)


def print_table(rows: list[Row]) -> None:
    """Print a table for each target, without empty columns."""
    for target in TARGETS:
        own = [row for row in rows if row["target"] == target]
        names = [
            name
            for name in dict.fromkeys(name for row in own for name in row)
            if name != "target" and any(row[name] is not None for row in own)
        ]
        if not own:
            continue
        shown = [[_shown(row[name]) for name in names] for row in own]
        print("\n".join(aligned([[target, *names[1:]], *shown], left=1)))
        print()


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def write_assembly(folder: Path, found: list[Compiled]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for one in found:
        if one.row is None:
            continue
        name = re.sub(r"[^\w.=-]+", "_", one.name)
        write_whole(folder / f"{name}.{one.target}.{TARGETS[one.target]}", one.assembly)


def all_launches(target: str) -> Iterable[Launch]:
    """The project's own launches, with their configurations for a target."""
    from fast.catalogue import launches

    return launches(target, lay_out)


def main(
    args: argparse.Namespace,
    launches: Callable[[str], Iterable[Launch]] = all_launches,
    table: Path = TABLE,
) -> int:
    try:
        import triton
    except ImportError:
        raise InputError("Triton is missing; pip install -e '.[fast]' (needs no GPU)") from None
    version = triton.__version__
    if line := unfit_triton():
        print(f"python -m tools.compile: warning: {line}", file=sys.stderr)
    if own := "--kernel" if args.kernel else "--hip" if args.hip else "":
        if args.update:
            raise InputError(f"--update writes {TABLE.name}, which {own} is not about")
        from fast.catalogue import hip_launches  # with Triton's for the same work

        launches = launches_of(args.kernel) if args.kernel else hip_launches
    if args.hip:
        if args.kernel:
            raise InputError("--hip and --kernel are two choices of kernels; expected one")
        if hip_compiler.ARCHITECTURE not in args.target:
            raise InputError(
                f"--hip is for {hip_compiler.ARCHITECTURE}; --target has {args.target[0]}"
            )
        args.target = [hip_compiler.ARCHITECTURE]
        compiler = hip_compiler.find()
        print(f"HIP: {compiler.name}, {hip_compiler.version(compiler)}", file=sys.stderr)

    def wanted(name: str, target: str) -> bool:
        return target in args.target and fnmatchcase(name, args.match)

    kept: list[Row] = []  # rows of the table that this run does not cover
    compares = args.check and not own
    old = read_table(table) if compares or (args.update and not _whole(args)) else None
    if old and args.update:
        if old["triton"] != version:
            raise InputError(f"{table.name} is of Triton {old['triton']}: update all of it")
        kept = [row for row in old["kernels"] if not wanted(row["name"], row["target"])]

    jobs = [
        (launch, target) for target in dict.fromkeys(args.target) for launch in launches(target)
    ]
    if not jobs:
        raise InputError(
            f"--kernel {args.kernel!r} gives no launch for {' and '.join(args.target)}"
        )
    times = Counter((launch.name, target) for launch, target in jobs)
    if twice := [name for (name, _), n in times.items() if n > 1]:
        raise InputError(f"more than one launch is named {twice[0]!r}")
    chosen = [job for job in jobs if fnmatchcase(job[0].name, args.match)]
    if not chosen:
        raise InputError(f"--match {args.match!r} fits the name of none of {len(jobs)} kernels")

    started = time.perf_counter()
    found = compile_all(chosen)
    seconds = time.perf_counter() - started
    print(f"{len(found)} compiled by Triton {version} in {seconds:.1f} s", file=sys.stderr)
    rows = [one.row for one in found if one.row is not None]
    if args.asm:
        write_assembly(args.asm, found)

    worse = [f"{one.name} {one.target}: {one.error}" for one in found if one.row is None]
    better: list[str] = []
    if args.check and own:
        worse += [f"{row['name']} {row['target']}: {line}" for row in rows for line in faults(row)]
    if compares and old:
        if old["triton"] != version:
            print(
                f"{table.name} is of Triton {old['triton']}, not {version}: occupancies, loads and "
                "bytes per instruction are not compared",
                file=sys.stderr,
            )
        bad, better = check(found, old, version, wanted)
        worse += bad
    if args.json:
        document = {"kernels": rows, "triton": version, "worse": worse, "better": better}
        print_json(document)
    else:
        print_table(rows)
        for line in better:
            print(f"better  {line}")
        for line in worse:
            print(f"WORSE   {line}")
    if args.update and not worse:
        write_table(table, kept + rows, version)
    return 1 if worse else 0


def _whole(args: argparse.Namespace) -> bool:
    """Whether this run covers all kernels and targets."""
    return args.match == "*" and set(args.target) == set(TARGETS)


if __name__ == "__main__":
    run(build_parser(), main)
