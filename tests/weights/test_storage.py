"""Safetensors files and their folders: what is read, what is refused in which words, what is written."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen35.errors import InputError
from weights import storage
from weights.storage import (
    INDEX,
    SINGLE,
    Stored,
    header,
    indexed_files,
    open_file,
    open_folder,
    read_header,
    read_json,
    row_major,
    safetensors_files,
    same_values,
    some,
    using_record,
    whole,
    write_whole,
)


def line(call: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as raised:
        call(*arguments)
    return str(raised.value)


def saved(file: Path, **tensors: Tensor) -> Path:
    save_file(tensors, file)
    return file


def held(tensor: Tensor, name: str = "x") -> Stored:
    return Stored(name, Path("file"), tensor.dtype, tuple(tensor.shape), lambda: tensor)


# --- one file


def test_tensors_are_views_of_one_mapping(tmp_path: Path) -> None:
    """Of every dtype, also where a number begins at an address that its size does not divide."""
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(2, 3).bfloat16(),
        "c": torch.randn(2, 0, 3), "d": torch.randn(5).double(), "e": torch.tensor(7),
        "f": torch.randn(4).to(torch.float8_e4m3fn), "g": torch.arange(4, dtype=torch.int32),
    }  # fmt: skip
    file = saved(tmp_path / "x.safetensors", **tensors)
    found = open_file(file)
    assert found.keys() == tensors.keys()
    for name, stored in found.items():
        expected = tensors[name]
        assert (stored.name, stored.file) == (name, file)
        assert (stored.dtype, stored.shape) == (expected.dtype, tuple(expected.shape))
        assert stored.nbytes == expected.nbytes
        read = stored.read()
        assert read.dtype == expected.dtype and read.shape == expected.shape
        assert bytes(row_major(read)) == bytes(row_major(expected))
    assert found["d"].read().untyped_storage().data_ptr() == (
        found["g"].read().untyped_storage().data_ptr()
    )


def raw(file: Path, entries: dict[str, Any], content: bytes) -> Path:
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return file


@pytest.mark.parametrize("name", ["a", "aa", "aaa", "aaaa"])
def test_numbers_at_odd_addresses_are_read(name: str, tmp_path: Path) -> None:
    """The header ends at any of them."""
    numbers = torch.tensor([1.5, -2.0])
    entries = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "__metadata__": {"format": "pt"},
    }
    file = raw(tmp_path / "x.safetensors", entries, b"\x07" + bytes(row_major(numbers)))
    found = open_file(file)
    assert found.keys() == {name, "b"}
    assert found[name].read().tolist() == [7] and torch.equal(found["b"].read(), numbers)


def test_files_that_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    assert line(open_file, file) == f"{file}: no such file"
    file.write_bytes(b"short")
    assert line(open_file, file).startswith(f"{file}: not a whole safetensors file: ")
    assert "\n" not in line(open_file, file) and "header" in line(open_file, file)
    raw(file, {"a": {"dtype": "I16", "shape": [1], "data_offsets": [0, 2]}}, b"\0\0")
    known = "BF16, F16, F32, F64, F8_E4M3, F8_E8M0, U8, I32, I64"
    assert line(open_file, file) == f"{file}: a has dtype I16; known are {known}"
    raw(file, {"a\n": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0")
    assert line(open_file, file) == f"{file}: no tensor: 'a\\n' of shape [1]"


def test_a_shape_without_numbers_may_not_be_of_any_size(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    raw(file, {"a": {"dtype": "U8", "shape": [0, 2**62], "data_offsets": [0, 0]}}, b"")
    assert open_file(file)["a"].shape == (0, 2**62)
    raw(file, {"a": {"dtype": "U8", "shape": [0, 2**62, 2], "data_offsets": [0, 0]}}, b"")
    assert line(open_file, file) == f"{file}: no tensor: 'a' of shape [0, {2**62}, 2]"


# --- folders


def test_without_an_index_it_is_one_file_or_all(tmp_path: Path) -> None:
    assert line(indexed_files, tmp_path) == f"{tmp_path}: neither {SINGLE} nor {INDEX} is there"
    b, a = (saved(tmp_path / f"{n}.safetensors", **{n: torch.zeros(1)}) for n in "ba")
    saved(tmp_path / ".c.safetensors", c=torch.zeros(1))
    (tmp_path / "d.txt").touch()
    assert safetensors_files(tmp_path) == [a, b]
    assert indexed_files(tmp_path) == {a: None, b: None}
    single = saved(tmp_path / SINGLE, x=torch.zeros(1))
    assert indexed_files(tmp_path) == {single: None}
    opened = open_folder(tmp_path)
    assert [stored.name for stored in opened.listed] == ["x"]
    assert [stored.name for stored in opened.unlisted] == ["a", "b"]
    b.write_bytes(b"")
    (problem,) = open_folder(tmp_path).problems
    assert problem.startswith(f"{b}: not a whole") and problem.endswith(
        "; it is in no index, and not used"
    )


def indexed(folder: Path, **files: str) -> None:
    weight_map = {name: f"{file}.safetensors" for file, names in files.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_names_files_and_tensors(tmp_path: Path) -> None:
    """They come in the order of files and names; other files are unlisted."""
    for file, names in {"b": "yx", "a": "z", "c": "w"}.items():
        saved(tmp_path / f"{file}.safetensors", **{name: torch.zeros(1) for name in names})
    indexed(tmp_path, b="xy", a="z")
    found = indexed_files(tmp_path)
    assert [*found.items()] == [
        (tmp_path / "a.safetensors", {"z"}), (tmp_path / "b.safetensors", {"x", "y"})
    ]  # fmt: skip
    opened = open_folder(tmp_path)
    assert [stored.name for stored in opened.listed] == ["z", "x", "y"]
    assert [stored.name for stored in opened.unlisted] == ["w"] and opened.problems == []


def test_indexes_that_are_refused(tmp_path: Path) -> None:
    b = saved(tmp_path / "b.safetensors", x=torch.zeros(1), y=torch.zeros(1))
    a = saved(tmp_path / "a.safetensors", z=torch.zeros(1))
    indexed(tmp_path, b="x", a="z")
    assert line(open_folder, tmp_path) == f"{b}: in the file but not in {INDEX}: y"
    indexed(tmp_path, b="xyv", a="z")
    assert line(open_folder, tmp_path) == f"{b}: in {INDEX} but not in the file: v"
    indexed(tmp_path, b="xy", a="zw")
    assert line(open_folder, tmp_path) == f"{a}: in {INDEX} but not in the file: w"
    saved(a, x=torch.zeros(1), z=torch.zeros(1))
    indexed(tmp_path, b="xy", a="z")
    said = f"{a}: x is in this file and, says {INDEX}, in b.safetensors"
    assert line(open_folder, tmp_path) == said
    (tmp_path / INDEX).unlink()
    assert line(open_folder, tmp_path) == f"{b}: x is in this file and in a.safetensors"


@pytest.mark.parametrize(
    "file", ["../b.safetensors", "c/b.safetensors", "b.bin", "b\n.safetensors", 3]
)
def test_an_index_may_only_name_files_of_its_folder(file: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": file}}))
    said = f"{tmp_path / INDEX}: {file!r} is not a safetensors file of this folder"
    assert line(indexed_files, tmp_path) == said


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("[]", "TypeError('list indices must be integers or slices, not str')"),
        ("{}", "KeyError('weight_map')"),
        ('{"weight_map": 3}', "AttributeError(\"'int' object has no attribute 'items'\")"),
    ],
)
def test_an_index_that_is_none(content: str, error: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    said = f"{tmp_path / INDEX}: no readable weight_map: {error}"
    assert line(indexed_files, tmp_path) == said


# --- comparisons


def test_the_same_dtype_is_compared_bit_by_bit() -> None:
    x = torch.tensor([[0.0, 1, torch.nan]])
    assert same_values(held(x), held(x.clone()))
    assert not same_values(held(x), held(x * torch.tensor([[-1.0, 1, 1]])))
    assert not same_values(held(x), held(x.reshape(3)))
    assert not same_values(held(x), held(x[:, :2]))


def test_other_dtypes_are_compared_by_their_numbers() -> None:
    x = torch.tensor([1.0, -0.0, 2.0])
    assert same_values(held(x), held(x.bfloat16())) and same_values(
        held(x.half()), held(x.double())
    )
    assert not same_values(held(x + 2.0**-20), held(x.bfloat16()))
    one_byte = torch.tensor([1, 0, 2], dtype=torch.uint8)
    assert same_values(held(one_byte), held(one_byte.clone()))
    assert not same_values(held(one_byte), held(x)) and not same_values(held(x), held(one_byte))


@pytest.mark.parametrize("at", [0, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_piece_is_compared(
    at: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PIECE", 4)
    x = torch.arange(9.0)
    other = x.to(dtype).index_fill(0, torch.tensor(at), 99)
    assert same_values(held(x), held(x.to(dtype))) and not same_values(held(x), held(other))


# --- writing


def test_a_header_is_read_by_the_library(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(2, 3), "a": torch.arange(5, dtype=torch.uint8), "c": torch.ones(())}
    start = header([(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
    assert len(start) % 8 == 0 and start[8:9] == b"{"
    file = tmp_path / "x.safetensors"
    file.write_bytes(start + b"".join(bytes(row_major(t)) for t in tensors.values()))
    found = load_file(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    described, first = read_header(file)
    assert first == len(start) and [*described] == ["b", "a", "c"]
    assert described["a"] == {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]}
    assert json.loads(start[8:])["__metadata__"] == {"format": "pt"}
    assert b", " not in start and b": " not in start


def test_bytes_are_in_the_order_of_rows() -> None:
    x = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    assert (
        bytes(row_major(x.T))
        == bytes(row_major(x.T.contiguous()))
        == struct.pack("<6h", 0, 3, 1, 4, 2, 5)
    )
    assert bytes(row_major(torch.tensor(3, dtype=torch.uint8))) == b"\x03"


@pytest.mark.parametrize("content", ["é", "é".encode()])
def test_a_file_is_written_whole(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_text("old")
    write_whole(file, content)
    assert file.read_bytes() == "é".encode() and [*tmp_path.iterdir()] == [file]


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """Its error names the file, not that under which it was written."""
    file = tmp_path / "x"
    file.write_text("old")
    for partial in (None, tmp_path / "y"):
        with pytest.raises(OSError) as raised, whole(file, partial) as path:
            assert path == (partial or tmp_path / f".x.{os.getpid()}")
            path.write_text("new")
            raise OSError(28, "No space", str(path))
        assert raised.value.filename == str(file)
        assert file.read_text() == "old" and [*tmp_path.iterdir()] == [file]


def test_records(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    assert read_json(file) is None
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
    with pytest.raises(InputError) as raised, using_record(file):
        raise KeyError("b")
    assert str(raised.value) == f"{file}: not what a conversion writes: KeyError('b')"
    with pytest.raises(InputError, match=r"^of its own$"), using_record(file):
        raise InputError("of its own")


def test_a_list_is_cut_after_three() -> None:
    assert some(["a"]) == "a" and some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b\n", "c", "d", "e"]) == r"a, 'b\n', c and 2 more"
