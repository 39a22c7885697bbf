"""Too little memory, and a prompt beyond the context: one line, before any weight is read."""

import argparse
import sys

import pytest
import torch

from qwen35.cli import Parser, run
from qwen35.errors import InputError
from qwen35.generate import build_parser, main
from qwen35.load import TINY, Loader, check_memory, load


@pytest.mark.parametrize("free, enough", [(999, False), (1000, True)])
def test_a_gpu_with_too_little_memory_is_named_with_both_values(
    monkeypatch: pytest.MonkeyPatch, free: int, enough: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 10**7, 2 * 10**10))
    if enough:
        check_memory(10**10, torch.device("cuda"))
        return
    words = "the weights take 10.0 GB; cuda has 10.0 GB free of 20.0 GB"
    with pytest.raises(InputError, match=words):
        check_memory(10**10, torch.device("cuda"))


def test_a_cpu_is_not_judged() -> None:
    check_memory(1 << 60, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_weights_take_what_is_counted(dtype: torch.dtype | None) -> None:
    """Experts stay in the file's format; the rest has the dtype that was asked for."""
    model = load(TINY, dtype=dtype)
    held = sum(tensor.nbytes for tensor in {id(p): p for p in model.parameters()}.values())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert Loader(TINY, dtype=dtype).nbytes == held + buffers


@pytest.mark.parametrize("prompt", [["--prompt-ids", ",".join(["5"] * 40_000)], ["word " * 60_000]])
def test_a_prompt_beyond_the_context_is_refused_before_the_weights_are_read(
    prompt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = sys.modules["qwen35.generate"]  # the package has a function of this name
    monkeypatch.setattr(command, "_load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=r"the prompt has \d+ tokens, the context 32768"):
        main(build_parser().parse_args(prompt))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. It has 1 GiB free. See a. b."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    MemoryError("no room"),
])  # fmt: skip
def test_memory_that_ends_meanwhile_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(args: argparse.Namespace) -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(Parser("x", "y"), fails, [])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert str(error).split(". ")[0] in said and "See a" not in said
