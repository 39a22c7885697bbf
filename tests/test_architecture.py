"""The house rules that a reader relies on, over the syntax tree: who imports whom, and
how plain the reference stays."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qwen35", "weights", "reference", "fast", "tests", "tools")
NOUNS = (
    "qwen35.config", "qwen35.config_json", "qwen35.cache", "qwen35.errors", "qwen35.reading",
)  # fmt: skip
FRONT = ("qwen35", "reference", "fast", "weights")  # what the front door may use

# What a file may import of this repository, by the longest prefix of its name that is listed.
ALLOWED: dict[str, tuple[str, ...]] = {
    "qwen35.config": NOUNS,
    "qwen35.config_json": NOUNS,
    "qwen35.cache": NOUNS,
    "qwen35.errors": (),
    "qwen35.reading": ("qwen35.errors",),
    "weights": ("weights", *NOUNS),
    "reference": ("reference", "weights", *NOUNS),
    "fast": ("fast", "weights", *NOUNS),
    "qwen35": FRONT,
    "tools": (*FRONT, "tools"),
    "tests": (*FRONT, "tools", "tests"),
}


def sources(*packages: str) -> list[Path]:
    """The Python files of these packages."""
    return sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))


def module_name(file: Path) -> str:
    """`weights/checkpoint.py` -> `weights.checkpoint`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def parse(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text(), str(file))


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Every module that is imported anywhere in a file, inside functions too, by absolute name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            if node.level:
                base = base[: len(base) - node.level + is_package]
            else:
                base = []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (_longest_module(f"{stem}.{alias.name}") for alias in node.names)


def _longest_module(name: str) -> str:
    """`qwen35.config.Config` -> `qwen35.config`: the part that is a file or a package."""
    parts = name.split(".")
    while len(parts) > 1:
        place = ROOT.joinpath(*parts)
        if place.with_suffix(".py").exists() or place.is_dir():
            break
        parts.pop()
    return ".".join(parts)


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def rule_for(module: str) -> tuple[str, ...]:
    """The imports that a module may have, by the most particular rule."""
    matching = [prefix for prefix in ALLOWED if _under(module, (prefix,))]
    return ALLOWED[max(matching, key=len)]


@pytest.mark.parametrize("file", sources(*PACKAGES), ids=lambda f: str(f.relative_to(ROOT)))
def test_import_directions(file: Path) -> None:
    """tools, tests -> front door -> fast, reference -> weights -> nouns; never backwards."""
    module = module_name(file)
    found = set(imports(parse(file), module, file.name == "__init__.py"))
    inside = {name for name in found if name.split(".")[0] in PACKAGES}
    wrong = sorted(name for name in inside if not _under(name, rule_for(module)))
    assert not wrong, f"{module} may not import {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("import reference.moe", "fast.moe", {"reference.moe"}),
        ("from reference import moe", "fast.moe", {"reference.moe"}),
        ("from reference.moe import MLP", "fast.moe", {"reference.moe"}),
        ("def f():\n    import fast", "reference.moe", {"fast"}),
        ("from . import load", "qwen35.generate", {"qwen35.load"}),
        ("from .load import load", "qwen35.generate", {"qwen35.load"}),
        ("from qwen35 import config", "weights.checkpoint", {"qwen35.config"}),
    ],
)
def test_the_import_finder(source: str, module: str, expected: set[str]) -> None:
    """The check is itself checked: no form of import slips through."""
    assert set(imports(ast.parse(source), module, is_package=False)) == expected


def test_the_rules_refuse_what_they_should() -> None:
    """The directions that matter most, spelled out."""
    refused = [
        ("reference.moe", "fast.moe"),
        ("fast.moe", "reference.moe"),
        ("weights.checkpoint", "reference.model"),
        ("weights.checkpoint", "fast"),
        ("weights.checkpoint", "qwen35.load"),
        ("reference.model", "qwen35.generate"),
        ("qwen35.config", "weights.checkpoint"),
        ("qwen35.load", "tools.train_tiny"),
    ]
    assert not [(a, b) for a, b in refused if _under(b, rule_for(a))]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda]:
    """Every function of a file, nested ones too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    yield from (node for node in ast.walk(tree) if isinstance(node, kinds))


@pytest.mark.parametrize("file", sources("reference"), ids=lambda f: f.name)
def test_the_reference_takes_what_it_needs_as_arguments(file: Path) -> None:
    """No **kwargs that pass through unseen, no global state, no environment, no hooks."""
    tree = parse(file)
    assert not [f.lineno for f in functions(tree) if f.args.kwarg]
    hidden = (ast.Global, ast.Nonlocal)
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, hidden)]
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"environ", "getenv", "register_forward_hook", "register_forward_pre_hook"}
    assert not set(imports(tree, module_name(file), False)) & {"os", "sys"}


@pytest.mark.parametrize("file", sources("reference"), ids=lambda f: f.name)
def test_forwards_stay_short(file: Path) -> None:
    """A forward is short enough to be read in one piece."""
    long = {
        f"{f.name} at line {f.lineno}": f.end_lineno - f.lineno + 1
        for f in functions(parse(file))
        if isinstance(f, ast.FunctionDef)
        and f.name == "forward"
        and f.end_lineno is not None
        and f.end_lineno - f.lineno + 1 > 40
    }
    assert not long


def test_the_reference_can_be_read_in_an_hour() -> None:
    """The whole specification, blank lines and comments included."""
    lines = {file.name: len(file.read_text().splitlines()) for file in sources("reference")}
    assert 0 < sum(lines.values()) < 750, lines


def reads_or_writes_text(call: ast.Call) -> bool:
    """`path.read_text()`, `path.write_text(x)`, `open(path)`, `path.open("w")`: not bytes, nor our own
    functions of such a name."""
    if isinstance(call.func, ast.Name):
        return call.func.id == "open"
    if not isinstance(call.func, ast.Attribute):
        return False
    modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    opens = call.func.attr == "open" and bool(modes) and "b" not in str(modes[0])
    return opens or call.func.attr in ("read_text", "write_text")


@pytest.mark.parametrize(
    "file", sources("qwen35", "weights", "reference", "fast", "tools"),
    ids=lambda f: str(f.relative_to(ROOT)),
)  # fmt: skip
def test_text_is_read_and_written_in_a_named_encoding(file: Path) -> None:
    """A locale decides otherwise, and a file from elsewhere is refused or misread."""
    calls = [node for node in ast.walk(parse(file)) if isinstance(node, ast.Call)]
    found = [
        call.lineno
        for call in calls
        if reads_or_writes_text(call) and "encoding" not in {k.arg for k in call.keywords}
    ]
    assert not found, f"{file.name}: lines {found}"


def repository_texts() -> Iterator[tuple[str, str]]:
    """Every text file that is part of the repository: no caches, no hidden work folders, and no files
    that somebody keeps in a checkout without adding them."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(git, capture_output=True, text=True, check=False)
    tracked = set(listed.stdout.split("\0")) if listed.returncode == 0 else None
    skipped = re.compile(r"(^|/)(\.(?!github|gitignore)[^/]*|__pycache__|[^/]*\.egg-info)(/|$)")
    for file in sorted(ROOT.rglob("*")):
        name = file.relative_to(ROOT).as_posix()
        if tracked is not None and name not in tracked:
            continue
        if skipped.search(name) or not file.is_file() or file.suffix == ".safetensors":
            continue
        try:
            yield name, file.read_text()
        except UnicodeDecodeError:
            continue


def test_no_file_names_a_place_on_one_machine() -> None:
    """An absolute path of somebody's machine is of no use to anybody else."""
    places = "|".join(("work", "root", "tmp"))
    path = re.compile(rf"(?<![\w.~/-])/(?:{places})/\w")
    found = [
        f"{name}:{number}"
        for name, text in repository_texts()
        for number, line in enumerate(text.splitlines(), 1)
        if path.search(line)
    ]
    assert not found


def test_a_scratch_file_is_not_judged() -> None:
    """The pages tell readers to save such files in the checkout's folder."""
    scratch = ROOT / "scratch_of_a_test.py"
    scratch.write_text("")
    try:
        git = subprocess.run(["git", "-C", str(ROOT), "status"], capture_output=True, check=False)
        if git.returncode:
            pytest.skip("this is no git checkout")
        assert scratch.name not in dict(repository_texts())
    finally:
        scratch.unlink()


def bound_again(function: ast.AST) -> set[str]:
    """Names that a function binds a second time outside of a loop and of a condition; `_` aside."""
    seen: set[str] = set()
    found: set[str] = set()

    def visit(node: ast.AST, carried: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
                continue
            if isinstance(child, (ast.arg, ast.Name)):
                name = child.arg if isinstance(child, ast.arg) else child.id
                if not (isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load)):
                    found.update({name} & seen - {"_"} if not carried else ())
                    seen.add(name)
            visit(child, carried or isinstance(child, (ast.For, ast.While, ast.If)))

    visit(function, False)
    return found


@pytest.mark.parametrize("file", sources("reference"), ids=lambda f: f.name)
def test_a_name_is_bound_once(file: Path) -> None:
    """Only a loop carries one on, and only a condition masks one, as CONTRIBUTING.md says."""
    kinds = (ast.FunctionDef,)
    wrong = {f.name: bound_again(f) for f in ast.walk(parse(file)) if isinstance(f, kinds)}
    assert not {name: names for name, names in wrong.items() if names}


def test_a_name_that_is_bound_twice_is_seen() -> None:
    assert bound_again(ast.parse("def f(x):\n    y = x\n    x = y").body[0]) == {"x"}
    assert not bound_again(ast.parse("def f(x):\n    for _ in x:\n        x = x").body[0])
