"""Processes over gloo: what they compute, and what is printed of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen35.load import TINY, load
from reference.model import Model
from tests.support.oracle import within_twice
from tests.support.ranks import ROOT, ended, on_threads, start
from tools.exact import prompt_of
from weights.convert import convert
from weights.output import Options


def logits(model: Model, prompt: list[int]) -> torch.Tensor:
    return model.lm_head(model(torch.tensor([prompt]), model.new_cache()))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_continue_prompts_with_the_same_bits(tmp_path: Path, size: int) -> None:
    """Greedy and sampled, with drafts, at two chunks, with a hit: the same
    tokens and bits in every way and on every rank, and logits as near to the truth as the reference's."""
    program = ["tests.support.rank_program", tmp_path, "--tp", size]
    (status, out, err), *others = ended(start(size, program), within_s=180)
    assert (status, out, err) == (0, "6 ways, 0 differ\n", "")
    assert others == [(0, "", "")] * (size - 1)
    found = [json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in range(size)]
    assert all(cells == found[0] for cells in found) and len(found[0]) == 6
    tensors = [load_file(tmp_path / f"rank-{r}.safetensors") for r in range(size)]
    ours = tensors[0]["logits"]
    assert all(torch.equal(own["logits"], ours) for own in tensors)
    assert not torch.equal(tensors[0]["layers.0.recurrent"], tensors[1]["layers.0.recurrent"])

    prompt = prompt_of(70, 2000)
    # The same sums as those of threads, bit for bit: gloo adds nothing of its own.
    in_threads = on_threads(size, lambda ranks: logits(load(TINY, ranks=ranks), prompt))
    assert torch.equal(ours, in_threads[0])
    with torch.inference_mode():
        truth, yardstick = (logits(load(TINY, dtype=d), prompt) for d in (torch.float64, None))
    error, most = within_twice(ours, yardstick, truth)
    assert error <= most


def test_torchrun_generates_from_converted_parts(tmp_path: Path) -> None:
    """Rank 0 alone prints: one document."""
    convert(TINY, tmp_path / "parts", Options("bf16", tp=2))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "-m", "qwen35.generate", "--tp", "2", "--model", tmp_path / "parts", "In the beginning",
        "--max-new-tokens", "8", "--json", "--prefix-cache", tmp_path / "kept",
    ]  # fmt: skip
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    document = json.loads(line)
    assert document["text"] == " of the second year of the re" and document["path"] == "reference"
    assert "layers.0.linear_attn=qwen35.parallel.nodes:Summed" in document["swaps"]
    assert done.stderr.count("2 ranks, each with ") == 1
    assert done.stderr.count("prompt tokens") == 1
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert kept == ["rank-0-of-2", "rank-1-of-2"]
