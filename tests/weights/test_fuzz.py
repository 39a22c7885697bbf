"""Damaged checkpoints by the hundred: one line of InputError, or numbers that are right, never a crash.

Small whole folders are mutated in their headers, their index and their quantization_config. The bytes of
the tensors stay as they are, so that what a reader should find is known: a parameter whose description
is untouched has its value, any other one at least the shape and the dtype that its entry states.
"""

import json
import resource
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen35.errors import InputError
from qwen35.load import load
from tests.support.checkpoints import (
    INDEX,
    MXFP4_CHANNEL,
    MXFP4_SHARED,
    QWEN3_5,
    QWEN3_5_FP8,
    QWEN3_NEXT_FP8,
    Dialect,
    write,
)
from weights.checkpoint import Checkpoint
from weights.entry import Entry
from weights.storage import DTYPES

MOST_GROWTH = 300 * 2**20  # bytes of resident memory, over all that follows
SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "hidden_size": 32,
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "num_attention_heads": 4,
    "linear_num_value_heads": 4,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
FOLDERS: dict[str, Dialect] = {
    "plain": QWEN3_5,
    "fp8": QWEN3_5_FP8,
    "mxfp4": replace(MXFP4_SHARED, shards=1),
    "mixed": replace(MXFP4_CHANNEL, shards=1),
    "next": QWEN3_NEXT_FP8,
}
Header = dict[str, Any]


class Whole(dict[str, tuple[Path, dict[str, Tensor]]]):
    """A whole folder of each dialect, with its parameters; short where an example is printed."""

    def __repr__(self) -> str:
        return "whole"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The folders that are copied and damaged, written once."""
    root = tmp_path_factory.mktemp("whole")
    return Whole(
        (name, (root / name, write(root / name, "122B-A10B", dialect, **SIZES)))
        for name, dialect in FOLDERS.items()
    )


@pytest.fixture(scope="module", autouse=True)
def memory(whole: object) -> Iterator[None]:
    """No header makes the process grow, whatever sizes it claims."""
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    assert grown < MOST_GROWTH


def fuzz(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


# --- the property ---------------------------------------------------------------------------------


def described(folder: Path) -> Header:
    """The dtype, shape and bytes of each tensor in a folder, for files whose headers can be read."""
    found: Header = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        start = length + 8
        for name, d in header.items():
            first, end = d["data_offsets"]
            found[name] = d["dtype"], d["shape"], raw[start + first : start + end]
    return found


def one_line(error: InputError) -> None:
    assert str(error)
    assert "\n" not in str(error)


def check(folder: Path, original: Header, expected: dict[str, Tensor], blocks: bool = True) -> bool:
    """The property; says whether the folder loaded. blocks: whether FP8 blocks are what they were."""
    try:
        checkpoint = Checkpoint(folder)
    except InputError as error:
        one_line(error)
        with warnings.catch_warnings(), pytest.raises(InputError):
            load(folder)
        return False
    now = described(folder)

    def untouched(entry: Entry) -> bool:
        names = [stored.name for stored in (entry.weight, entry.scale) if stored]
        return all(now[name] == original.get(name) for name in names) and (
            blocks or entry.format != "fp8"
        )

    for name, entry in checkpoint.entries.items():
        try:
            tensor = entry.read()
            wide = entry.read(torch.float64)
        except InputError as error:
            one_line(error)
            continue
        assert tuple(tensor.shape) == tuple(wide.shape) == entry.shape
        assert tensor.dtype == (entry.dtype if entry.format == "plain" else torch.bfloat16)
        if name in expected and untouched(entry):
            assert torch.equal(wide, expected[name].double()), name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load(folder, dtype=torch.float64)
    except InputError as error:
        one_line(error)
        return False
    for name, parameter in model.named_parameters():
        entry = checkpoint.entries.get(name)
        if ".experts." not in name and entry is not None and untouched(entry):
            assert torch.equal(parameter, expected[name].double()), name
    return True


def damaged(
    whole: Whole,
    dialect: str,
    damage: Callable[[Path], object],
    blocks: bool = True,
) -> bool:
    """Copy a folder, damage it, and check the property."""
    source, expected = whole[dialect]
    with TemporaryDirectory() as place:
        folder = Path(place) / "model"
        shutil.copytree(source, folder)
        original = described(source)
        damage(folder)
        return check(folder, original, expected, blocks)


def a_file(folder: Path, which: int) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    return files[which % len(files)]


def rewrite(file: Path, change: Callable[[Header], object]) -> None:
    """The header again after `change`; the tensors' bytes stay."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


# --- what is put where ----------------------------------------------------------------------------

dialects = st.sampled_from(sorted(FOLDERS))
flips = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 255) | st.sampled_from(b'0123456789,:"[]{}BFU'),
)
anywhere = st.floats(0, 1, exclude_max=True)  # a place in something whose length is not known yet
numbers = st.one_of(
    st.integers(-2, 200),
    st.sampled_from([2**e + d for e in (31, 32, 53, 60, 62, 63, 64, 100) for d in (-1, 0, 1)]),
    st.floats(),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8))
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
kinds = st.sampled_from(
    [*DTYPES, "F8_E5M2", "I8", "BOOL", "I16", "U64", "F4", "F6_E2M3", "C64", "bf16", "X", ""]
)
shapes = st.one_of(
    st.lists(st.integers(0, 4), max_size=4),
    st.lists(numbers, max_size=4),
    st.lists(st.lists(st.integers(0, 4), max_size=2), max_size=3),
    junk,
)
offsets = st.one_of(st.lists(numbers, min_size=2, max_size=2), st.lists(numbers, max_size=3), junk)
ODD_NAMES = [
    "", ".weight", "weight", "weight_scale", ".weight_scale", "__metadata__", "mtp.fc.weight",
    "model.visual.x", "a\nb", "a\nb.weight_scale", "\x00", "\x1b[2J", "\ud800", "\u2028",
    "model.language_model.layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.0.up_proj.weight",
    "model.layers.0.linear_attn.in_proj_qkvz.weight", "x.in_proj_ba.weight",
    "model.language_model.layers.999999999999999999999.mlp.gate.weight", "x" * 10_000,
]  # fmt: skip
names = st.one_of(st.sampled_from(ODD_NAMES), st.text(max_size=12))


KINDS = [
    "drop", "rename", "copy", "swap", "dtype", "shape", "zero", "transpose", "flatten", "offsets",
    "shift", "overlap", "metadata", "field", "replace", "odd",
]  # fmt: skip


@st.composite
def changes(draw: st.DrawFn) -> Callable[[Header], object]:
    """One thing done to a header."""
    kind = draw(st.sampled_from(KINDS))
    place, other = draw(anywhere), draw(anywhere)
    value = {
        "rename": names, "copy": names, "dtype": st.one_of(kinds, junk), "shape": shapes,
        "offsets": offsets, "shift": st.integers(-64, 64), "metadata": junk,
        "field": st.tuples(st.text(max_size=6), junk), "replace": junk,
        "odd": st.tuples(names, kinds, numbers),
    }  # fmt: skip
    what = draw(value[kind]) if kind in value else None

    def change(header: Header) -> None:
        keys = sorted(key for key in header if key != "__metadata__")
        if not keys:
            return
        name, second = keys[int(place * len(keys))], keys[int(other * len(keys))]
        tensor = header[name]
        if kind == "drop":
            header.pop(name)
        elif kind == "rename":
            header[what] = header.pop(name)
        elif kind == "copy":
            header[what] = dict(tensor) if isinstance(tensor, dict) else tensor
        elif kind == "swap":
            header[name], header[second] = header[second], tensor
        elif kind == "metadata":
            header["__metadata__"] = what
        elif kind == "replace":
            header[name] = what
        elif kind == "odd":  # a legal tensor of no bytes, under any name
            header[what[0]] = {"dtype": what[1], "shape": [0, what[2]], "data_offsets": [0, 0]}
        elif isinstance(tensor, dict) and isinstance(header[second], dict):
            edit(tensor, header[second])

    def edit(tensor: Header, second: Header) -> None:
        shape, span = tensor.get("shape"), tensor.get("data_offsets")
        if kind in ("dtype", "shape"):
            tensor[kind] = what
        elif kind == "zero" and isinstance(shape, list):
            tensor |= {"shape": [0, *shape], "data_offsets": [0, 0]}
        elif kind == "transpose" and isinstance(shape, list):
            tensor["shape"] = shape[::-1]
        elif kind == "flatten" and isinstance(shape, list):
            tensor["shape"] = [*shape, 1] if place < 0.5 else [1, *shape]
        elif kind == "offsets":
            tensor["data_offsets"] = what
        elif kind == "shift" and isinstance(span, list):
            tensor["data_offsets"] = [n + what if isinstance(n, int) else n for n in span]
        elif kind == "overlap":
            tensor["data_offsets"] = second.get("data_offsets")
        elif kind == "field":
            tensor[what[0]] = what[1]

    return change


# --- headers --------------------------------------------------------------------------------------


def test_a_whole_folder_loads(whole: Whole) -> None:
    """The property holds where nothing is damaged, and then it is not an error."""
    for dialect in FOLDERS:
        assert damaged(whole, dialect, lambda folder: None)


@fuzz(400)
@given(dialects, st.integers(0, 1), st.lists(changes(), min_size=1, max_size=2))
def test_changed_headers(whole: Whole, dialect: str, which: int, todo: list[Callable]) -> None:
    """Names, dtypes, shapes and offsets of every kind and type."""

    def damage(folder: Path) -> None:
        for change in todo:
            rewrite(a_file(folder, which), change)

    damaged(whole, dialect, damage)


@fuzz(150)
@given(dialects, names, kinds, st.lists(st.integers(0, 2**63), max_size=3))
@example(dialect="plain", name="x", kind="BF16", shape=[2**63])
@example(dialect="plain", name="x", kind="BF16", shape=[2**32, 2**32])
@example(dialect="plain", name="x.experts.down_proj", kind="BF16", shape=[2**62, 2**62])
def test_tensors_of_no_bytes(
    whole: Whole, dialect: str, name: str, kind: str, shape: list[int]
) -> None:
    """Legal in the format, at any size of the other axes and under any name: no size is believed."""

    def change(header: Header) -> None:
        header[name] = {"dtype": kind, "shape": [0, *shape], "data_offsets": [0, 0]}

    damaged(whole, dialect, lambda folder: rewrite(a_file(folder, 0), change))


@fuzz(250)
@given(
    dialects,
    st.integers(0, 1),
    st.lists(flips, min_size=1, max_size=3),
)
def test_flipped_bytes(
    whole: Whole, dialect: str, which: int, flipped: list[tuple[float, int]]
) -> None:
    """Any bytes of the header become any other."""

    def damage(folder: Path) -> None:
        file = a_file(folder, which)
        raw = bytearray(file.read_bytes())
        (length,) = struct.unpack("<Q", raw[:8])
        for place, byte in flipped:
            raw[8 + int(place * length)] = byte
        file.write_bytes(raw)

    damaged(whole, dialect, damage)


@fuzz(150)
@given(
    dialects,
    st.integers(0, 1),
    st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 5000), st.integers(20, 63).map(lambda e: 1 << e)),
    st.none() | anywhere,
)  # fmt: skip
def test_lengths_and_truncations(
    whole: Whole, dialect: str, which: int, length: int, cut: float | None
) -> None:
    """The header's length is any number, or the file ends anywhere."""

    def damage(folder: Path) -> None:
        file = a_file(folder, which)
        raw = file.read_bytes()
        if cut is None:
            file.write_bytes(struct.pack("<Q", length) + raw[8:])
        else:
            file.write_bytes(raw[: int(cut * len(raw))])

    damaged(whole, dialect, damage)


@fuzz(60)
@given(
    st.binary(max_size=200)
    | st.text(max_size=100).map(str.encode)
    | junk.map(json.dumps).map(str.encode)
)
def test_headers_of_anything(whole: Whole, text: bytes) -> None:
    """Bytes, text and JSON that describe no tensors."""

    def damage(folder: Path) -> None:
        a_file(folder, 0).write_bytes(struct.pack("<Q", len(text)) + text)

    assert not damaged(whole, "mxfp4", damage)


@pytest.mark.parametrize("depth", [100, 2_000, 200_000])
def test_nested_headers(whole: Whole, depth: int) -> None:
    """Deep JSON in each of the files."""
    deep = "[" * depth + "]" * depth
    for text in (deep, f'{{"x": {deep}}}', f'{{"__metadata__": {deep}}}'):

        def damage(folder: Path, text: str = text) -> None:
            a_file(folder, 0).write_bytes(struct.pack("<Q", len(text)) + text.encode())

        assert not damaged(whole, "plain", damage)
    for text in (deep, f'{{"weight_map": {deep}}}', f'{{"weight_map": {{"x": {deep}}}}}'):

        def damage(folder: Path, text: str = text) -> None:
            (folder / INDEX).write_text(text)

        assert not damaged(whole, "fp8", damage)


def test_repeated_keys(whole: Whole) -> None:
    """A name twice in a header: whichever of the two is taken, the bytes are those it describes."""
    for field in ('"dtype":"U8"', '"shape":[1]', '"data_offsets":[0,2]', '"dtype":"BF16"'):

        def damage(folder: Path, field: str = field) -> None:
            file = a_file(folder, 0)
            raw = file.read_bytes()
            (length,) = struct.unpack("<Q", raw[:8])
            text = raw[8 : 8 + length].replace(b'{"dtype"', b"{" + field.encode() + b',"dtype"')
            file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

        damaged(whole, "mxfp4", damage)
    for extra in (
        '"mtp.fc.weight":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',
        '"mtp.fc.weight":1',
    ):
        for first in (True, False):

            def damage(folder: Path, extra: str = extra, first: bool = first) -> None:
                file = a_file(folder, 0)
                raw = file.read_bytes()
                (length,) = struct.unpack("<Q", raw[:8])
                inner = raw[8 : 8 + length].decode().strip()[1:-1]
                text = ("{" + ",".join([extra, inner] if first else [inner, extra]) + "}").encode()
                file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

            damaged(whole, "plain", damage)


# --- the index ------------------------------------------------------------------------------------

ODD_FILES = [
    "", ".", "..", "../model.safetensors", "a.safetensors", "a\n.safetensors", "\x00.safetensors",
    "\ud800.safetensors", "config.json", INDEX, "x" * 5000 + ".safetensors", ".safetensors",
    "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors/",
    "model-00001-of-00002.safetensors\n",
]  # fmt: skip
files = st.one_of(st.sampled_from(ODD_FILES), junk)


@fuzz(250)
@given(
    st.sampled_from(["fp8", "next"]),
    st.sampled_from(["drop", "rename", "point", "add", "all", "map", "document"]),
    anywhere,
    names,
    files,
    junk,
)
def test_changed_indexes(
    whole: Whole, dialect: str, kind: str, place: float, name: str, file: Any, value: Any
) -> None:
    """Entries renamed, pointing elsewhere, or of any type: what loads, is what was written."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / INDEX).read_text())
        promised = document["weight_map"]
        key = sorted(promised)[int(place * len(promised))]
        if kind == "drop":
            promised.pop(key)
        elif kind == "rename":
            promised[name] = promised.pop(key)
        elif kind == "point":
            promised[key] = file
        elif kind == "add":
            promised[name] = file
        elif kind == "all":
            document["weight_map"] = dict.fromkeys(promised, file)
        elif kind == "map":
            document["weight_map"] = value
        else:
            document = value
        (folder / INDEX).write_text(json.dumps(document))

    damaged(whole, dialect, damage)


@fuzz(150)
@given(st.lists(flips, max_size=3), st.none() | anywhere)
def test_flipped_bytes_of_an_index(
    whole: Whole, flipped: list[tuple[float, int]], cut: float | None
) -> None:
    """No longer text, no longer JSON, or other names."""

    def damage(folder: Path) -> None:
        raw = bytearray((folder / INDEX).read_bytes())
        for place, byte in flipped:
            raw[int(place * len(raw))] = byte
        (folder / INDEX).write_bytes(raw if cut is None else raw[: int(cut * len(raw))])

    damaged(whole, "fp8", damage)


# --- the claim ------------------------------------------------------------------------------------

sizes_of_blocks = st.lists(st.integers(1, 300) | numbers, min_size=2, max_size=2)
globs = st.lists(
    st.sampled_from(["*", "mtp.*", "[", "[!", "**", "lm_head", "", ".", "?" * 50])
    | st.text(max_size=6)
)


@fuzz(250)
@given(
    dialects,
    st.one_of(
        junk,
        st.fixed_dictionaries(
            {"quant_method": st.sampled_from(["fp8", "quark", "awq"]) | junk},
            optional={
                "exclude": globs | junk,
                "modules_to_not_convert": globs | junk,
                "weight_block_size": sizes_of_blocks | junk,
            },
        ),
    ),
    st.booleans(),
)
def test_changed_claims(whole: Whole, dialect: str, claim: Any, inside: bool) -> None:
    """Whatever is claimed, only the blocks of FP8 depend on it."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        document.pop("quantization_config", None)
        (document.get("text_config", document) if inside else document)["quantization_config"] = (
            claim
        )
        (folder / "config.json").write_text(json.dumps(document))

    size = claim.get("weight_block_size") if isinstance(claim, dict) else None
    damaged(whole, dialect, damage, blocks=size in (None, [128, 128]))


@pytest.mark.parametrize("claim", ["[" * 200_000 + "]" * 200_000, "1" * 5000], ids=["deep", "long"])
def test_claims_that_are_no_json_for_python(whole: Whole, claim: str) -> None:
    """JSON that Python's reader gives up on: nested too deep, or a number of too many digits."""

    def damage(folder: Path) -> None:
        text = (folder / "config.json").read_text().rstrip().removesuffix("}")
        (folder / "config.json").write_text(f'{text}, "x": {claim}}}')

    assert not damaged(whole, "plain", damage)


@pytest.mark.parametrize("block", [[128, 1 << 63], [1 << 70, 128]], ids=["columns", "rows"])
def test_claims_of_huge_blocks(whole: Whole, block: list[int]) -> None:
    """A block larger than every matrix: refused, or each matrix is one block."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        document["quantization_config"]["weight_block_size"] = block
        (folder / "config.json").write_text(json.dumps(document))

    damaged(whole, "fp8", damage)
