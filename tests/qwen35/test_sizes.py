"""Sizes on command lines: one way to write them, for the prefix cache and for converted files."""

import argparse
from collections.abc import Callable

import pytest

from qwen35.cli import SIZE_RULE, size
from qwen35.generate import build_parser as generate
from tools.convert import build_parser as convert


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0), ("4000000", 4_000_000), ("4K", 4096), ("4KB", 4000), ("4KiB", 4096),
        ("512M", 512 * 2**20), ("512MiB", 512 * 2**20), ("512MB", 512_000_000), ("4G", 4 * 2**30),
        ("4GiB", 4 * 2**30), ("4GB", 4 * 10**9), ("2T", 2 * 2**40), ("2TB", 2 * 10**12),
    ],
)  # fmt: skip
def test_sizes(text: str, nbytes: int) -> None:
    """A bare letter counts in 1024, as `iB` does; `B` counts in 1000."""
    assert size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "G", "4g", "4gb", "4 GB", "4.5G", "-1", "4B", "4iB", "4GiB ", "0x4", "٤G", "4GBB"]
)
def test_what_is_no_size(text: str) -> None:
    """Named, with examples."""
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        size(text)
    assert repr(text) in str(caught.value)
    assert "4GB" in str(caught.value)


@pytest.mark.parametrize(
    ("parser", "before", "option"),
    [(generate, ["x"], "prefix_cache_bytes"), (convert, ["a", "b", "--to", "bf16"], "shard_bytes")],
    ids=["generate", "convert"],
)
def test_both_command_lines_take_them(
    parser: Callable[[], argparse.ArgumentParser], before: list[str], option: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Both have one rule, which their help says. Anything that is no size is one line."""
    flag = f"--{option.replace('_', '-')}"
    for text in ("4GB", "4G", "4GiB", "512M"):
        assert getattr(parser().parse_args([*before, flag, text]), option) == size(text)
    assert SIZE_RULE in " ".join(parser().format_help().split())
    with pytest.raises(SystemExit) as left:
        parser().parse_args([*before, flag, "4XB"])
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert err.count("\n") == 1 and "'4XB'" in err and flag in err
