"""Sizes around the block that a loop goes by: less than one, exactly one, one and a bit, several, and
several with a bit. Whatever a loop handles in pieces is compared with the whole at once."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from weights import fp8, hub, rounding, storage
from weights.entry import Entry
from weights.hub import Repository
from weights.outline import BLOCK, _on_disk
from weights.output import arrange, convert_tensor
from weights.rounding import Rounding
from weights.storage import DTYPES, Stored, header, open_file, read_header, same_values

SIZES = (1, 127, 128, 129, 256, 300)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(tensor: Tensor, name: str = "w.weight") -> Stored:
    return Stored(name, Path("file"), tensor.dtype, tuple(tensor.shape), lambda: tensor)


# --- quantisation


@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("N", SIZES)
def test_blocks_of_fp8(N: int, K: int) -> None:
    """Each block is encoded as if it were alone, by its own largest number, and decoded by its scale."""
    weight = random(1, N, K) * torch.logspace(-2, 2, N)[:, None] * torch.logspace(-1, 1, K)
    numbers, scales = fp8.quantize_blocks(weight)
    rows, columns = torch.arange(N) // 128, torch.arange(K) // 128
    assert scales.shape == (rows[-1] + 1, columns[-1] + 1)
    for i, row in enumerate(weight.split(128)):
        for j, tile in enumerate(row.split(128, dim=1)):
            alone, scale = fp8.quantize_blocks(tile)
            found = numbers[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            assert torch.equal(found.view(torch.uint8), alone.view(torch.uint8))
            assert scales[i, j] == scale[0, 0] == (tile.abs().max() / 448).bfloat16()
    exact = numbers.double() * scales[rows][:, columns].double()
    assert torch.equal(fp8.dequantize(numbers, scales, torch.float64), exact)


# --- measuring what is lost


def by_hand(
    exact: Tensor, rough: Tensor, group: int
) -> tuple[float, float, float, tuple[int, int]]:
    """Squares of the errors and of the numbers; the largest relative error of a group, and its place."""
    x, y = (t.double().view(len(exact), -1, group) for t in (exact, rough))
    lost, whole = (y - x).square().sum(-1), x.square().sum(-1)
    relative = (lost / whole).sqrt()
    row, column = divmod(int(relative.argmax()), relative.shape[1])
    return lost.sum().item(), whole.sum().item(), relative.max().item(), (row, column)


@pytest.mark.parametrize("measured", [1, 64, 3 * 64, 3 * 64 + 1, 1 << 18])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 7])
def test_a_rounding_is_measured_whole(
    rows: int, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows at a time, at least one, with the worst group in each row."""
    monkeypatch.setattr(rounding, "MEASURED", measured)
    exact = random(2, rows, 64)
    for worst in range(rows):
        rough = exact.bfloat16().float()
        rough[worst, 40] += 1.0
        found, heights = Rounding(), list[int]()

        def approximate(part: slice, rough: Tensor = rough, heights: list[int] = heights) -> Tensor:
            heights.append(len(rough[part]))
            return rough[part]

        found.add("w", exact, approximate)
        assert sum(heights) == rows and max(heights) == min(rows, max(1, measured // 64))
        errors, squares, largest, (row, group) = by_hand(exact, rough, 32)
        assert (found.tensors, found.elements) == (1, rows * 64)
        assert found.squares == pytest.approx(squares, rel=1e-12)
        assert found.error_squares == pytest.approx(errors, rel=1e-12)
        assert found.worst == pytest.approx(largest, rel=1e-12)
        assert row == worst and found.worst_at == f"w[{row}, {group * 32}:{group * 32 + 32}]"


@pytest.mark.parametrize("to", ["bf16", "fp8", "mxfp4"])
@pytest.mark.parametrize("step", [1, 100, 128, 129, 1000])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_a_conversions_error_is_that_of_what_it_writes(
    rows: int, step: int, to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured `step` rows at a time, which need not begin with a block of scales."""
    monkeypatch.setattr(rounding, "MEASURED", 96 * step)
    exact = random(3, rows, 96) * torch.logspace(-1, 1, rows)[:, None]
    entry = Entry(stored(exact), tuple(exact.shape))
    error = Rounding()
    made = convert_tensor(entry, "w", to, error)
    if to == "bf16":
        rough = made[0].float()
    else:
        kind = Entry(stored(made[0]), tuple(exact.shape), to, stored(made[1], "w.scale"))
        rough = kind.read(torch.float32)
    errors, squares, largest, (row, group) = by_hand(exact, rough, 32)
    assert error.error_squares == pytest.approx(errors, rel=1e-9)
    assert error.squares == pytest.approx(squares, rel=1e-9)
    assert error.worst == pytest.approx(largest, rel=1e-9)
    assert error.worst_at == f"w[{row}, {group * 32}:{group * 32 + 32}]"


# --- comparing, filling, counting


@pytest.mark.parametrize("other", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 8, 9])
def test_values_are_compared_to_the_last(
    size: int, other: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at a time; a difference in any one place is seen."""
    monkeypatch.setattr(storage, "PIECE", 4)
    numbers = random(4, size)
    same = stored(numbers.to(other))
    assert same_values(stored(numbers), same)
    for place in range(size):
        changed = numbers.clone()
        changed[place] += 1
        assert not same_values(stored(changed), same), place


def test_files_are_filled_to_the_limit() -> None:
    """They are filled to the byte. A tensor that is larger than a file may be has a file of its
    own."""

    def filled(*sizes: int) -> list[list[int]]:
        held: Any = [(SimpleNamespace(files=("a",)), (SimpleNamespace(nbytes=n),)) for n in sizes]
        return [[slot.nbytes for slot in file.slots] for file in arrange(held, limit=10)]

    assert filled(9) == [[9]]
    assert filled(10) == [[10]]
    assert filled(11) == [[11]]
    assert filled(4, 6) == [[4, 6]]
    assert filled(4, 6, 1) == [[4, 6], [1]]
    assert filled(4, 7) == [[4], [7]]
    assert filled(1, 11, 1) == [[1], [11], [1]]
    assert filled(5, 5, 5, 5, 5) == [[5, 5], [5, 5], [5]]


def test_whole_blocks_of_a_disk() -> None:
    sizes = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 1]
    assert [_on_disk(size) // BLOCK for size in sizes] == [0, 1, 1, 1, 2, 3, 4]


# --- headers of files, here and on the hub


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A safetensors file of one tensor, in a folder of its own."""
    made = tmp_path / "there" / "w.safetensors"
    made.parent.mkdir()
    tensor = random(5, 3, 5)
    start = header([("w", tensor.dtype, tuple(tensor.shape))])
    made.write_bytes(start + tensor.numpy().tobytes())
    return made


@pytest.mark.parametrize("length", range(1, 18))
def test_a_header_is_filled_to_eight_bytes(length: int, tmp_path: Path) -> None:
    """Whatever the names add to it."""
    made = tmp_path / "w.safetensors"
    start = header([("n" * length, DTYPES["F32"], (2,)), ("m", DTYPES["U8"], (3,))])
    assert len(start) % 8 == 0
    made.write_bytes(start + bytes(11))
    found = open_file(made)
    assert {name: one.shape for name, one in found.items()} == {"n" * length: (2,), "m": (3,)}


@pytest.mark.parametrize("more", [-60, -1, 0, 1, 100])
def test_a_header_that_is_as_long_as_the_first_request(
    more: int, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second request is made where a byte is missing, and only there."""
    content = file.read_bytes()
    _, end = read_header(file)
    monkeypatch.setattr(hub, "PROBABLY", end + more)
    asked: list[int] = []
    repository = object.__new__(Repository)
    repository.name, repository.sizes = "a/b", {file.name: len(content)}

    def first_bytes(name: str, count: int) -> bytes:
        asked.append(count)
        return content[:count]

    monkeypatch.setattr(repository, "_first_bytes", first_bytes)
    repository._fetch_header(file.name, tmp_path / file.name)
    assert asked == [end + more] + [end] * (more < 0)
    hollow = (tmp_path / file.name).read_bytes()
    assert len(hollow) == len(content)
    assert hollow[:end] == content[:end] and not any(hollow[end:])
    assert json.loads(hollow[8:end]) == json.loads(content[8:end])


@pytest.mark.parametrize("piece", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17])
def test_a_stream_is_read_to_the_byte(
    count: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces have any size, and the server sends all that it has. No piece more than needed is
    taken."""
    content, taken = bytes(range(50)), list[int]()

    def pieces() -> Iterator[bytes]:
        for first in range(0, len(content), piece):
            taken.append(first)
            yield content[first : first + piece]

    @contextmanager
    def stream(*_: Any, **__: Any) -> Iterator[Any]:
        yield SimpleNamespace(raise_for_status=lambda: None, iter_bytes=pieces)

    monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(stream=stream))
    assert hub._read_stream("https://hub", {}, count) == content[:count]
    assert len(taken) == -(-count // piece)
