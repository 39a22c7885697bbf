"""`python -m tools.mutate`: mutation testing: change the code, and see if the tests fail.

mutmut (the extra `mutate`) mutates each module of MODULES in a copy of the checkout, and runs each
mutant against the tests of that module. A mutant that survives is printed as the two lines that
differ, unless mutants.json lists it as equivalent, with the reason why no test can detect it.
--update writes the counts to mutants.json; docs/trust.md takes its table from there. An interrupted
run continues in the same --folder. A mutant takes one to twenty seconds. The exit status is 1 if a
mutant survives that mutants.json does not list.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from qwen35.cli import Parser, at_least_one, print_json, run
from qwen35.errors import InputError
from qwen35.progress import Progress
from weights.storage import write_whole

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("mutants.json")
PACKAGES = ("qwen35", "reference", "weights", "fast", "tools")
ALIVE = ("survived", "no tests")

# Modules, each with its tests.
MODULES: dict[str, tuple[str, ...]] = {
    "reference/activation.py": ("tests/reference/test_modules.py",),
    "reference/rope.py": ("tests/reference/test_rope.py", "tests/reference/test_modules.py"),
    "reference/norm.py": ("tests/reference",),
    "reference/linear.py": ("tests/reference",),
    "reference/attention.py": ("tests/reference",),
    "reference/deltanet.py": ("tests/reference",),
    "reference/moe.py": ("tests/reference",),
    "qwen35/sampling.py": ("tests/qwen35/test_sampling.py", "tests/qwen35/test_penalties.py"),
    "qwen35/speculative.py": ("tests/qwen35/test_speculative.py", "tests/qwen35/test_drafts.py"),
    "qwen35/cache.py": ("tests/qwen35/test_cache.py", "tests/qwen35/test_fp8_cache.py"),
    "qwen35/swap.py": ("tests/qwen35/test_swap.py",),
    "weights/mxfp4.py": ("tests/weights/test_mxfp4.py",),
    "weights/fp8.py": ("tests/weights/test_fp8.py",),
    "weights/shard.py": ("tests/weights/test_shard.py",),
}


def build_parser() -> Parser:
    parser = Parser("python -m tools.mutate", __doc__ or "", computes=False)
    add = parser.add_argument
    add("--module", nargs="+", choices=MODULES, default=[*MODULES], metavar="FILE",
        help=f"which (default: all): {', '.join(MODULES)}")  # fmt: skip
    add(
        "--folder",
        type=Path,
        required=True,
        metavar="DIR",
        help="for the copies; may be there already",
    )
    add("--processes", type=at_least_one, default=1, metavar="N", help="mutants at a time")
    add("--update", action="store_true", help=f"write the counts to {TABLE.name}")
    add("--json", action="store_true", help="print one JSON document")
    return parser


def prepare(module: str, folder: Path) -> None:
    """Copy the checkout into `folder`, with a mutmut configuration for one module. Nothing is done
    if the folder exists."""
    if folder.exists():
        return
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    options = tomllib.loads(text)["tool"]["pytest"]["ini_options"]["addopts"]
    settings = {
        "source_paths": sorted({module.partition("/")[0]}),
        "only_mutate": [module],
        "also_copy": [*PACKAGES, "docs", "README.md", "CONTRIBUTING.md"],
        "pytest_add_cli_args": ["-p", "no:cacheprovider"],
        "pytest_add_cli_args_test_selection": list(MODULES[module]),
    }
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    # One process for the tests: mutmut forks it for each mutant.
    text = text.replace(json.dumps(options), json.dumps(options.replace("-n 2 ", "")))
    project.write_text(f"{text}\n[tool.mutmut]\n{lines}\n", encoding="utf-8")


def mutmut(folder: Path, *arguments: str) -> str:
    """Run mutmut in a copy of the checkout. Returns its standard output. InputError if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments], cwd=folder, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise InputError(f"mutmut {arguments[0]} in {folder}: {' '.join(last)}")
    return done.stdout


def change(folder: Path, mutant: str) -> str:
    """The change of a mutant, as `- old line + new line`, without indents."""
    lines = mutmut(folder, "show", mutant).splitlines()
    changed = [line for line in lines if line[:1] in "-+" and line[:3] not in ("---", "+++")]
    return " ".join(f"{line[0]} {line[1:].strip()}" for line in changed)


def examine(module: str, folder: Path, processes: int, known: dict[str, str]) -> dict[str, Any]:
    """Mutate a module. Returns counts, and the mutants that survive, as texts of `change`.

    known: the equivalent mutants, with the reasons.
    """
    prepare(module, folder)
    mutmut(folder, "run", "--max-children", str(processes))
    lines = mutmut(folder, "results", "--all", "true").splitlines()
    outcomes = dict(line.strip().rsplit(": ", 1) for line in lines if ": " in line)
    alive = [change(folder, name) for name, outcome in outcomes.items() if outcome in ALIVE]
    equivalent = [text for text in alive if text in known]
    return {
        "mutants": len(outcomes),
        "killed": len(outcomes) - len(alive),
        "equivalent": len(equivalent),
        "alive": [text for text in alive if text not in known],
    }


def main(args: argparse.Namespace) -> int:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    with Progress("modules", len(args.module)) as progress:
        for module in args.module:
            known = table.get(module, {}).get("equivalents", {})
            folder = args.folder / module.replace("/", ".")
            found[module] = examine(module, folder, args.processes, known)
            if args.update:
                counts = {n: found[module][n] for n in ("mutants", "killed", "equivalent")}
                table[module] = counts | {"equivalents": known}
                write_whole(TABLE, json.dumps(table, indent=1, ensure_ascii=False) + "\n")
            progress.update()
    if args.json:
        print_json(found)
        return int(any(row["alive"] for row in found.values()))
    print(f"{'module':28} {'mutants':>7} {'killed':>7} {'equivalent':>10} {'alive':>6}")
    for module, row in found.items():
        counts = f"{row['mutants']:7} {row['killed']:7} {row['equivalent']:10}"
        print(f"{module:28} {counts} {len(row['alive']):6}")
    for module, row in found.items():
        for text in row["alive"]:
            print(f"{module}: {text}")
    return int(any(row["alive"] for row in found.values()))


if __name__ == "__main__":
    run(build_parser(), main)
