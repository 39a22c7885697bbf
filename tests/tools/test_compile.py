"""`tools.compile` on small kernels: its figures against the assembly's text, and each way to worsen."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fast import hip_compiler
from fast.launch import Launch
from qwen35.cli import run
from qwen35.errors import InputError
from tools.cards import occupancy_gfx950, occupancy_sm90
from tools.compile import (
    TARGETS,
    Compiled,
    Row,
    build_parser,
    check,
    compile_all,
    faults,
    lane_bytes,
    main,
    read_table,
    wave_bytes,
    write_table,
)
from tools.gfx950 import waits
from tools.gfx950.assembly import parse
from tools.gfx950.effects import effects

triton = pytest.importorskip("triton")
tl = triton.language

ROOT = Path(__file__).parents[2]
Cli = Callable[..., tuple[int, str, str]]


@triton.jit
def stream(x, w, out, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A product of 8-bit weights with a vector."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, n_columns, COLUMNS):
        weight = tl.load(w + row[:, None] * n_columns + start + column[None, :])
        total += weight.to(tl.float32) * tl.load(x + start + column)[None, :]
    tl.store(out + row, tl.sum(total, 1))


@triton.jit
def product(x, w, scale, out, n, SIDE: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr):
    """x in FORMAT with MXFP4 weights."""
    side, k = tl.arange(0, SIDE), tl.arange(0, K)
    half, group = tl.arange(0, K // 2), tl.arange(0, K // 32)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, n, K):
        a = tl.load(x + side[:, None] * n + start + k[None, :])
        b = tl.load(w + side[None, :] * (n // 2) + start // 2 + half[:, None])
        s = tl.load(scale + side[:, None] * (n // 32) + start // 32 + group[None, :])
        total = tl.dot_scaled(a, None, FORMAT, b, s, "e2m1", total)
    tl.store(out + side[:, None] * SIDE + side[None, :], total)


@triton.jit
def greedy(x, out, SIZE: tl.constexpr):
    """Keeps SIZE values at once."""
    i = tl.arange(0, SIZE)
    value = tl.load(x + i)
    tl.store(out + i, value * tl.sum(value))


@triton.jit
def wrong(x):
    tl.store(x, tl.arange(0, 3))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def streamed(name: str = "stream 4x1024", rows: int = 4, **options: int) -> Launch:
    arguments = {
        "x": empty(4096), "w": empty(64, 4096, dtype=torch.int8), "out": empty(64),
        "n_columns": 4096, "ROWS": rows, "COLUMNS": 1024,
    }  # fmt: skip
    return Launch(name, stream, (64 // rows, 1, 1), arguments, options, weight_bytes=rows * 1024)


def multiplied(name: str, format: str, dtype: torch.dtype) -> Launch:
    arguments = {
        "x": empty(64, 4096, dtype=dtype), "w": empty(64, 2048, dtype=torch.uint8),
        "scale": empty(64, 128, dtype=torch.uint8), "out": empty(64, 64), "n": 4096,
        "SIDE": 64, "K": 128, "FORMAT": format,
    }  # fmt: skip
    return Launch(name, product, (1, 1, 1), arguments, {"num_warps": 4})


def samples(target: str) -> Iterator[Launch]:
    yield streamed(num_warps=4)
    yield multiplied("product bf16", "bf16", torch.bfloat16)
    yield multiplied("product e4m3", "e4m3", torch.float8_e4m3fn)


def spilling(target: str) -> Iterator[Launch]:
    """More than the 512 registers that a lane of gfx950 has, or the 255 of a thread of sm_90."""
    for size in (32768, 8192) if target == "gfx950" else (8192,):
        arguments = {"x": empty(size), "out": empty(size), "SIZE": size}
        yield Launch(f"greedy {size}", greedy, (1, 1, 1), arguments, {"num_warps": 1})


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This file has a cache of its own, in which each kernel is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return compile_all([(launch, target) for target in TARGETS for launch in samples(target)])


@pytest.fixture
def table(compiled: list[Compiled], tmp_path: Path) -> Path:
    """A table with the samples, as they are."""
    path = tmp_path / "compile.json"
    write_table(path, [dict(one.row or {}) for one in compiled], triton.__version__)
    return path


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], table: Path) -> Cli:
    """The command line in this process, over the samples: exit status, stdout, stderr."""

    def call(*arguments: object, launches: Any = samples) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            run(
                build_parser(),
                lambda args: main(args, launches, table),
                [str(argument) for argument in arguments],
            )
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return call


def row_of(compiled: list[Compiled], name: str, target: str) -> tuple[Row, str]:
    """The row of a launch, and its assembly."""
    one = next(one for one in compiled if (one.name, one.target) == (name, target))
    assert one.row is not None, one.error
    return one.row, one.assembly


def judge(compiled: list[Compiled], path: Path) -> tuple[list[str], list[str]]:
    return check(compiled, read_table(path), triton.__version__, lambda name, target: True)


def edit(path: Path, name: str, target: str, **figures: Any) -> Row:
    """Change what is recorded of a kernel."""
    document = json.loads(path.read_text())
    row = next(r for r in document["kernels"] if (r["name"], r["target"]) == (name, target))
    row |= figures
    path.write_text(json.dumps(document))
    return row


def number(pattern: str, text: str) -> int:
    """That follows the pattern."""
    found = re.search(pattern + r"\s*(\d+)", text)
    assert found, pattern
    return int(found[1])


@pytest.mark.parametrize("name", ["stream 4x1024", "product bf16", "product e4m3"])
def test_gfx950_figures_are_those_of_the_assembly(compiled: list[Compiled], name: str) -> None:
    row, text = row_of(compiled, name, "gfx950")
    assert row["vgpr"] == number("; TotalNumVgprs:", text)
    assert row["agpr"] == number("; NumAgprs:", text)
    assert row["sgpr"] == number(r"\.sgpr_count:", text)
    assert row["vgpr_spills"] == row["sgpr_spills"] == row["scratch"] == 0
    assert row["code_bytes"] == number("; codeLenInByte =", text)
    without_lds = number("; Occupancy:", text)  # LLVM does not know of the LDS: it is dynamic
    assert row["occupancy"] == min(without_lds, 163840 // (-(-row["lds"] // 1280) * 1280))
    assert row["fp4_converts"] == len(re.findall(r"v_cvt_scalef32_pk_bf16_fp4\b", text))
    assert row["scaled_mfma"] == len(re.findall(r"v_mfma_scale_f32_\w+", text))
    assert row["mfma"] == len(re.findall(r"v_mfma_f32_\w+", text))
    assert faults(row) == []


def test_which_instructions_stand_for_what(compiled: list[Compiled]) -> None:
    native, upcast = (row_of(compiled, f"product {name}", "gfx950")[0] for name in ("e4m3", "bf16"))
    assert native["scaled_mfma"] and not native["mfma"] and not native["fp4_converts"]
    assert upcast["mfma"] and not upcast["scaled_mfma"] and upcast["fp4_converts"]
    hopper, sass = row_of(compiled, "product bf16", "sm_90")
    assert hopper["wgmma"] == len(re.findall(r"\bHGMMA\b", sass)) > 0
    assert hopper["wide_loads"] == len(re.findall(r"\bLDG(?:STS)?\.\S*128", sass)) > 0


def test_bytes_per_vector_instruction(compiled: list[Compiled]) -> None:
    """4 rows of 1024 bytes and 1024 numbers of x in a pass; by four waves."""
    row, text = row_of(compiled, "stream 4x1024", "gfx950")
    loops = re.findall(r"^(\.LBB\w+):(.*?)s_cbranch_\w+ \1\n", text, re.S | re.M)
    assert len(loops) == 1
    body = loops[0][1]
    valu = len(re.findall(r"^\tv_", body, re.M))
    assert row["weight_bytes_per_valu"] == round(4096 / 4 / valu, 2)
    assert row["loop_bytes"] == 4096 + 4096
    assert (row["wide_loads"], row["narrow_loads"]) == (2, 0)
    assert row_of(compiled, "product bf16", "gfx950")[0]["weight_bytes_per_valu"] is None


@pytest.mark.parametrize(
    ("line", "lane", "wave"),
    [
        ("buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen", 16, 1024),
        ("buffer_load_dwordx4 v1, s[8:11], 0 offen lds", 16, 1024),
        ("global_load_lds_dwordx4 v[2:3], off", 16, 1024),
        ("global_load_dwordx2 v[0:1], v[2:3], off", 8, 512),
        ("global_load_ubyte v0, v1, s[0:1]", 1, 64),
        ("buffer_load_short_d16_hi v0, v1, s[0:3], 0 offen", 2, 128),
        ("s_load_dwordx8 s[0:7], s[0:1], 0x8", 0, 32),
        ("s_buffer_load_dword s0, s[0:3], 0x0", 0, 4),
        ("ds_read_b128 v[0:3], v4", 0, 0),
        ("scratch_load_dwordx4 v[0:3], off, off", 0, 0),
        ("buffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen", 0, 0),
    ],
)
def test_bytes_of_a_load(line: str, lane: int, wave: int) -> None:
    (instruction,) = parse(f"kernel:\n\t{line}\n", "kernel").instructions
    assert (lane_bytes(instruction), wave_bytes(instruction)) == (lane, wave)


@pytest.mark.parametrize(
    ("vgpr", "lds", "warps", "waves"),
    [(0, 0, 4, 8), (64, 0, 4, 8), (65, 0, 4, 7), (128, 0, 1, 4), (512, 0, 1, 1),
     (8, 20480, 4, 8), (8, 20481, 4, 7), (8, 81920, 4, 2), (8, 160 * 1024, 8, 2),
     (8, 160 * 1024, 1, 0.25), (8, 160 * 1024 + 1, 4, 0)],
)  # fmt: skip
def test_occupancy_of_gfx950(vgpr: int, lds: int, warps: int, waves: float) -> None:
    assert occupancy_gfx950(vgpr, lds, warps) == waves


def test_occupancy_of_sm90() -> None:
    """NVIDIA's occupancy calculator gives the same."""
    assert occupancy_sm90(32, 0, 4) == 16
    assert occupancy_sm90(128, 0, 8) == 4
    assert occupancy_sm90(255, 0, 4) == 2
    assert occupancy_sm90(32, 227 * 1024, 4) == 1
    assert occupancy_sm90(33, 0, 4) == 12  # 40 registers are taken: 12 programs


def test_spills_are_faults_even_if_recorded(cli: Cli, table: Path, tmp_path: Path) -> None:
    status, out, _ = cli("--json", launches=spilling)
    assert status == 0
    rows = {(row["name"], row["target"]): row for row in json.loads(out)["kernels"]}
    for key in [("greedy 32768", "gfx950"), ("greedy 8192", "sm_90")]:
        assert rows[key]["vgpr_spills"] > 0 and rows[key]["scratch"] > 0
    assert not rows["greedy 8192", "gfx950"]["vgpr_spills"]
    assert cli("--update", launches=spilling)[0] == 0
    status, out, _ = cli("--check", "--match", "greedy 8192", launches=spilling)
    assert status == 1
    spilled = rows["greedy 8192", "sm_90"]["vgpr_spills"]
    lines = [line for line in out.splitlines() if line.startswith("WORSE")]
    assert lines[0] == f"WORSE   greedy 8192 sm_90: {spilled} vector registers spilled"
    assert len(lines) == 2


def test_nothing_changed(cli: Cli) -> None:
    status, out, err = cli("--check")
    assert status == 0 and "WORSE" not in out and "better" not in out
    assert err.startswith("6 compiled by Triton") and err.count("\n") == 1


WORSE = [
    ("stream 4x1024", "gfx950", {"wide_loads": 3}, "wide_loads 3 -> 2"),
    ("stream 4x1024", "gfx950", {"weight_bytes_per_valu": 41.0}, "weight_bytes_per_valu 41.0 -> "),
    ("product bf16", "gfx950", {"occupancy": 8, "vgpr": 60}, "occupancy 8 -> 4, vgpr 60 -> "),
    ("product bf16", "gfx950", {"occupancy": 5, "lds": 64}, "occupancy 5 -> 4, lds 64 -> 20736"),
    ("product bf16", "sm_90", {"occupancy": 8}, "occupancy 8 -> 3"),
    ("product e4m3", "gfx950", {"fp4_converts": 16}, "fp4_converts 16 -> 0"),
    ("product bf16", "gfx950", {"scaled_mfma": 6}, "scaled_mfma 6 -> 0"),
]


@pytest.mark.parametrize(("name", "target", "figures", "said"), WORSE)
def test_what_is_worse(
    compiled: list[Compiled], table: Path, name: str, target: str, figures: Row, said: str
) -> None:
    edit(table, name, target, **figures)
    worse, better = judge(compiled, table)
    assert len(worse) == 1 and worse[0].startswith(f"{name} {target}: {said}")
    assert better == []


@pytest.mark.parametrize(
    ("figures", "said"),
    [({"wide_loads": 1}, "wide_loads 1 -> 2"), ({"occupancy": 3}, "occupancy 3 -> 8"),
     ({"weight_bytes_per_valu": 30.0}, "weight_bytes_per_valu 30.0 -> "),
     ({"vgpr_spills": 7}, "vgpr_spills 7 -> 0"), ({"scratch": 7}, "scratch 7 -> 0")],
)  # fmt: skip
def test_what_is_better_does_not_fail(cli: Cli, table: Path, figures: Row, said: str) -> None:
    edit(table, "stream 4x1024", "gfx950", **figures)
    status, out, _ = cli("--check", "--match", "stream*", "--target", "gfx950")
    assert status == 0
    assert f"better  stream 4x1024 gfx950: {said}" in out


def test_what_changes_nothing_is_not_told(compiled: list[Compiled], table: Path) -> None:
    """Registers and LDS that cost no wave, a figure within its tolerance."""
    row = row_of(compiled, "stream 4x1024", "gfx950")[0]
    near = row["weight_bytes_per_valu"] * 1.015
    edit(table, "stream 4x1024", "gfx950", vgpr=10, lds=0, weight_bytes_per_valu=near)
    assert judge(compiled, table) == ([], [])


def test_faults_of_a_row(compiled: list[Compiled]) -> None:
    row = row_of(compiled, "stream 4x1024", "gfx950")[0]
    assert faults(row | {"weight_bytes_per_valu": 13.0}) == []
    assert faults(row | {"weight_bytes_per_valu": 12.99}) == [
        "weight_bytes_per_valu 12.99, less than 13"
    ]
    assert faults(row | {"scratch": 16}) == ["16 bytes of scratch"]
    assert faults(row | {"sgpr_spills": 2}) == ["2 scalar registers spilled"]


def test_no_figure_without_the_loop_of_the_weights(compiled: list[Compiled]) -> None:
    """One launch claims one byte more than its loop loads, and one kernel has no loop."""
    most = replace(streamed(num_warps=4), weight_bytes=8192)
    over = replace(most, name="over", weight_bytes=8193)
    arguments = {"x": empty(1024), "out": empty(1024), "SIZE": 1024}
    gone = Launch("gone", greedy, (1, 1, 1), arguments, {"num_warps": 4}, weight_bytes=4096)
    rows = [one.row or {} for one in compile_all([(k, "gfx950") for k in (most, over, gone)])]
    half = row_of(compiled, "stream 4x1024", "gfx950")[0]["weight_bytes_per_valu"]
    assert rows[0]["weight_bytes_per_valu"] == pytest.approx(2 * half, rel=1e-3)
    assert [row["weight_bytes_per_valu"] for row in rows[1:]] == [None, None]


def test_kernels_and_table_have_to_agree(cli: Cli, table: Path) -> None:
    check = "--check", "--target", "gfx950"
    status, out, _ = cli(*check, launches=lambda target: [*samples(target), streamed("other", 8)])
    assert status == 1
    assert "other gfx950: not in compile.json; python -m tools.compile --update adds it" in out
    status, out, _ = cli(*check, launches=lambda target: [streamed(num_warps=4)])
    assert status == 1
    lines = [line for line in out.splitlines() if line.startswith("WORSE")]
    assert len(lines) == 2
    assert lines[0].endswith(
        "but there is no such kernel; python -m tools.compile --update removes it"
    )
    status, _, _ = cli(*check, "--match", "s*", launches=lambda target: [streamed(num_warps=4)])
    assert status == 0  # entries that this run is not about are left alone


def test_of_another_triton_only_faults_and_lost_instructions_count(cli: Cli, table: Path) -> None:
    edit(table, "stream 4x1024", "gfx950", wide_loads=9, occupancy=9, weight_bytes_per_valu=90.0)
    document = json.loads(table.read_text())
    table.write_text(json.dumps(document | {"triton": "3.0.0"}))
    status, out, err = cli("--check")
    assert status == 0 and "WORSE" not in out
    assert "compile.json is of Triton 3.0.0, not " in err and err.count("\n") == 2
    edit(table, "product e4m3", "gfx950", fp4_converts=4)
    assert cli("--check")[0] == 1
    status, _, err = cli("--update", "--match", "stream*")
    assert status == 2 and "is of Triton 3.0.0" in err and err.count("\n") == 1


def test_update(cli: Cli, table: Path) -> None:
    """A part leaves the other entries as they are; the whole leaves no others."""
    before = table.read_text()
    edit(table, "stream 4x1024", "gfx950", wide_loads=9)
    edit(table, "product bf16", "gfx950", wide_loads=9)
    assert cli("--update", "--match", "stream*", "--target", "gfx950")[0] == 0
    rows = {(r["name"], r["target"]): r for r in json.loads(table.read_text())["kernels"]}
    assert len(rows) == 6
    assert rows["stream 4x1024", "gfx950"]["wide_loads"] == 2
    assert rows["product bf16", "gfx950"]["wide_loads"] == 9
    assert cli("--update")[0] == 0
    assert table.read_text() == before
    table.unlink()
    assert cli("--check")[::2] == (
        2, f"python -m tools.compile: {table} is missing; python -m tools.compile --update writes it\n"
    )  # fmt: skip
    assert cli("--update", launches=lambda target: [streamed(num_warps=4)])[0] == 0
    assert len(json.loads(table.read_text())["kernels"]) == 2
    assert list(table.parent.iterdir()) == [table]
    columns = {"name": "x", "target": "gfx950"}
    for text in ("{}", json.dumps({"triton": triton.__version__, "kernels": [columns]})):
        table.write_text(text)
        status, _, err = cli("--check")
        assert status == 2 and err.count("\n") == 1 and "is no table of compiled kernels" in err


def test_json_is_one_document(cli: Cli) -> None:
    status, out, _ = cli("--json", "--check")
    assert status == 0 and out.count("\n") == 1
    document = json.loads(out)
    assert document["triton"] == triton.__version__ and document["worse"] == []
    assert len(document["kernels"]) == 6
    required = {
        "name", "target", "vgpr", "agpr", "sgpr", "vgpr_spills", "sgpr_spills", "scratch", "lds",
        "occupancy", "code_bytes", "weight_bytes_per_valu", "wide_loads", "narrow_loads",
    }  # fmt: skip
    assert all(required <= row.keys() for row in document["kernels"])


def test_the_table_for_people(cli: Cli) -> None:
    status, out, _ = cli("--target", "gfx950", "--match", "stream*")
    header, row, *rest = out.splitlines()
    assert status == 0 and rest == [""]
    assert header.split()[:3] == ["gfx950", "vgpr", "agpr"]
    assert row.startswith("stream 4x1024  ") and len(row) == len(header)


def test_assembly_files(cli: Cli, compiled: list[Compiled], tmp_path: Path) -> None:
    assert cli("--asm", tmp_path / "new" / "asm")[0] == 0
    files = {path.name: path.read_text() for path in (tmp_path / "new" / "asm").iterdir()}
    assert len(files) == 6
    assert files["stream_4x1024.gfx950.s"] == row_of(compiled, "stream 4x1024", "gfx950")[1]
    assert "EXIT" in files["product_bf16.sm_90.sass"]


def test_a_kernel_that_does_not_compile_is_named(cli: Cli, table: Path) -> None:
    before = table.read_text()
    bad = Launch("bad", wrong, (1, 1, 1), {"x": empty(4)}, {"num_warps": 4})
    for option in ("--check", "--update"):
        status, out, _ = cli("--json", option, launches=lambda target: [*samples(target), bad])
        assert status == 1
        worse = json.loads(out)["worse"]
        assert [line.partition(": ")[0] for line in worse] == ["bad gfx950", "bad sm_90"]
        assert "power of 2" in worse[0]
    assert table.read_text() == before


class Crash:
    """A kernel that takes the compiler's process with it."""

    def warmup(self, **_: Any) -> None:
        os._exit(1)


def test_a_crash_of_the_compiler(cli: Cli) -> None:
    bad = Launch("bad", Crash(), (1, 1, 1), {}, {})
    status, out, err = cli("--json", launches=lambda target: [bad])
    assert (status, out) == (2, "") and "--match" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--match", "attention*"], "--match 'attention*' fits the name of none of 6 kernels"),
        (["--target", "gfx900"], "invalid choice: 'gfx900'"),
        (["--check", "--update"], "not allowed with argument"),
    ],
)
def test_wrong_use_is_told_in_one_line(cli: Cli, arguments: list[str], said: str) -> None:
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1


def test_two_launches_of_one_name(cli: Cli) -> None:
    status, _, err = cli(launches=lambda target: [streamed(), streamed()])
    assert status == 2 and "'stream 4x1024'" in err and err.count("\n") == 1


def test_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; "
        "from tools.compile import *; run(build_parser(), main, [])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install -e '.[fast]'" in done.stderr and done.stderr.count("\n") == 1


def test_without_path_and_gpu(compiled: list[Compiled], tmp_path: Path) -> None:
    """The process has an empty environment, and compiles anew."""
    program = (
        "from tests.tools.test_compile import *; "
        "run(build_parser(), lambda args: main(args, samples), ['--json'])"
    )
    environment = {
        "PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kernels"] == [one.row for one in compiled]


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("gfx950", "*"),
        ("sm_90", "down *"),
        pytest.param("sm_90", "*", marks=pytest.mark.slow),  # its assembler takes a minute for all
    ],
)
def test_the_projects_kernels_are_no_worse_than_the_committed_table(
    target: str, names: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Kernels in every configuration. On gfx950 each waits for what it loads and writes back: Triton's
    LLVM may leave out the wait between a write-back and the atomic that tells of it."""
    arguments = build_parser().parse_args(
        ["--target", target, "--match", names, "--check", "--json", "--asm", str(tmp_path)]
    )
    assert main(arguments) == 0, capsys.readouterr().out
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert kernels and {row["target"] for row in kernels} == {target}
    for row in kernels:
        assert not row["vgpr_spills"] and not row["scratch"], row
    if target == "gfx950":
        hot = [row for row in kernels if row["weight_bytes_per_valu"]]
        assert hot and all(row["weight_bytes_per_valu"] >= 13 for row in hot)
        texts = [file.read_text() for file in tmp_path.glob("*.s")]
        assert len(texts) == len(kernels)
        assert sum("buffer_wbl2" in text for text in texts) >= 12
        for text in texts:
            (name,) = re.findall(r"\.globl\s+(\w+)", text)
            program = parse(text, name)
            waits.check(program, [effects(one) for one in program.instructions])


# ---- HIP


def test_the_hip_kernels_stand_beside_tritons(cli: Cli):
    """They do the same work. They have no spills, and load as many bytes of weights a vector
    instruction as are asked."""
    status, out, _ = cli("--hip", "--check", "--json", "--match", "* D=4096 I=128")
    rows = {row["name"].split()[0]: row for row in json.loads(out)["kernels"]}
    assert status == 0 and list(rows) == ["experts", "gate_up", "down"]
    row = rows["experts"]
    assert row["weight_bytes_per_valu"] >= 28 and row["narrow_loads"] == 0 < row["wide_loads"]
    assert row["vgpr"] <= 168  # nine waves on four SIMDs


def test_the_hip_router_stands_beside_tritons(cli: Cli):
    """It has no loop over its weights: four loads of them and of rows, and the choice's of the sums."""
    status, out, _ = cli("--hip", "--check", "--json", "--match", "ro* N=769 K=4096 E=512")
    rows = {row["name"].split()[0]: row for row in json.loads(out)["kernels"]}
    assert status == 0 and list(rows) == ["router", "route"]
    row = rows["router"]
    assert row["mfma"] == 4 and row["wide_loads"] == 4 + 4 + 2 * 4 and row["loop_bytes"] == 0
    assert row["weight_bytes_per_valu"] is None and row["vgpr"] <= 128


def test_what_hip_cannot_be_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    def refused(*arguments: str) -> str:
        status, out, err = cli("--hip", *arguments)
        assert status == 2 and not out and err.count("\n") == 1, err
        return err.removeprefix("python -m tools.compile: ").strip()

    assert refused("--target", "sm_90") == "--hip is for gfx950; --target has sm_90"
    assert refused("--update") == "--update writes compile.json, which --hip is not about"
    message = "--hip and --kernel are two choices of kernels; expected one"
    assert refused("--kernel", f"{__file__}:samples") == message

    def nothing() -> None:
        raise InputError("no compiler for HIP; looked for some")

    monkeypatch.setattr(hip_compiler, "find", nothing)
    assert refused() == "no compiler for HIP; looked for some"
