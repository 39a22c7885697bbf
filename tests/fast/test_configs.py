"""Launch configurations: what the table says, what takes its place, and blocks that fit."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from fast import configs
from qwen35.errors import InputError

ONE, TWO, THREE = {"num_warps": 1}, {"num_warps": 2}, {"num_warps": 3}
TABLE = {
    "gfx950": {
        "down": {"D=1024 I=128": ONE, "D=4096 I=128": TWO, "D=4096 I=1024": THREE},
        "linear": {"N=16 K=32": ONE},
    }
}


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The table above, in a file."""
    file = tmp_path / "configs.json"
    file.write_text(json.dumps(TABLE))
    monkeypatch.setattr(configs, "TABLE", file)
    for cached in (configs.table, configs.lookup):
        cached.cache_clear()
    yield
    for cached in (configs.table, configs.lookup):
        cached.cache_clear()


def test_a_shape_has_a_name() -> None:
    assert configs.key(D=4096, I=128) == "D=4096 I=128"
    assert configs.key(K=1) == "K=1"


def test_a_shape_of_the_table_and_a_kernels_default_come_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configs.lookup("gfx950", "down", "D=4096 I=128") == TWO
        assert configs.lookup("gfx950", "linear", "N=16 K=32") == ONE
        usual = configs.lookup("gfx950", "linear", "N=16 K=64")
        assert usual == configs.USUAL["gfx950"]["linear"]
        assert configs.lookup("sm_90", "linear", "N=16 K=32") == configs.USUAL["sm_90"]["linear"]


@pytest.mark.parametrize(
    ("shape", "nearest", "found"),
    [
        ("D=4096 I=256", "D=4096 I=128", TWO),
        ("D=4096 I=512", "D=4096 I=1024", THREE),
        ("D=1500 I=128", "D=1024 I=128", ONE),
        ("D=2100 I=64", "D=4096 I=128", TWO),
        ("D=1024 I=2048", "D=4096 I=1024", THREE),
    ],
)
def test_another_shape_takes_the_nearest_with_a_warning(
    shape: str, nearest: str, found: dict[str, int]
) -> None:
    """Near are small quotients, of all sizes together."""
    with pytest.warns(UserWarning) as said:
        assert configs.lookup("gfx950", "down", shape) == found
    assert [str(one.message) for one in said] == [
        f"down {shape} is not in configs.json for gfx950; it runs with the configuration of "
        f"{nearest} (python -m tools.tune measures it)"
    ]
    assert said[0].filename == __file__


@pytest.mark.parametrize(
    ("target", "kernel"), [("gfx950", "up"), ("gfx942", "down"), ("x", "linear")]
)
def test_a_kernel_without_any_is_refused(target: str, kernel: str) -> None:
    with pytest.raises(InputError) as raised:
        configs.lookup(target, kernel, "D=1 I=2")
    assert str(raised.value) == f"configs.json has no configuration of {kernel} for {target}"


WIDE = {"BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3}


@pytest.mark.parametrize(
    ("N", "K", "fp4", "changes"),
    [
        (4096, 1024, True, {}),
        (96, 256, True, {"BLOCK_N": 32}),
        (64, 384, True, {"BLOCK_K": 128, "num_warps": 2}),
        (32, 128, True, {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 1}),
        (16, 128, True, {"BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 1}),
        (4096, 1024, False, {"BLOCK_K": 128}),
        (96, 192, False, {"BLOCK_N": 32, "BLOCK_K": 64}),
        (96, 48, False, {"BLOCK_N": 32, "BLOCK_K": 16}),
    ],
)
def test_blocks_divide_the_sizes(N: int, K: int, fp4: bool, changes: dict[str, int]) -> None:
    """Of FP4, shorter blocks have fewer warps, each of at least 32 rows; bf16 has at most 128 columns."""
    assert configs.fitted(WIDE, N, K, fp4=fp4) == WIDE | changes
    few = WIDE | {"num_warps": 1}
    assert configs.fitted(few, N, K, fp4=fp4) == few | changes | {"num_warps": 1}


def test_weights_are_fp4_unless_it_is_said() -> None:
    assert configs.fitted(WIDE, 4096, 1024) == WIDE
