"""`tools.bench step`: the bytes that a round's launches have to move, without a card."""

import warnings
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from fast.launch import Launch
from fast.step import Step
from fast.target import KERNELS
from tools.bench.step import moved, random_model, share_of


def test_a_round_moves_the_same_bytes_with_either_kernel_of_the_experts(
    monkeypatch: pytest.MonkeyPatch,
):
    """The HIP kernels take fewer launches for the same weights."""
    for module in ("tools.bench.step", "fast.layer", "fast.mtp"):
        monkeypatch.setattr(f"{module}.target_of", lambda device: "gfx950")
    config = replace(share_of("tiny", 1), num_experts=4)
    bytes_of, launches = {}, {}
    for kernel in KERNELS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes that are not in the table of configurations
            model = random_model(config, torch.device("cpu"), moe_kernel=kernel)
            step = Step(model, 128, 3)
        work = [one for one in step.work if isinstance(one, Launch)]
        bytes_of[kernel] = sum(moved(one, 3, 100) for one in work)
        launches[kernel] = len(work)
    assert bytes_of["hip"] == bytes_of["triton"] > 0
    assert launches["triton"] - launches["hip"] == config.num_hidden_layers + 3  # drafts' layers
