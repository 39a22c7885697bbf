"""Cutting tensors for ranks and joining them again, and what is refused."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35.config import Config
from qwen35.errors import InputError
from tests.support.shards import noise
from weights.shard import TABLE, Plan, Shard, join


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


# --- cutting and joining


LAYOUTS = [
    ("layers.0.linear_attn.in_proj_qkv.weight", (12288, 8)),
    ("layers.0.linear_attn.conv1d.weight", (12288, 1, 4)),
    ("layers.3.self_attn.k_proj.weight", (512, 8)),
    ("layers.3.self_attn.o_proj.weight", (8, 8192)),
    ("layers.3.self_attn.k_norm.weight", (256,)),
    ("layers.0.mlp.experts.gate_up_proj", (3, 2048, 8)),
    ("layers.0.mlp.experts.down_proj", (3, 8, 1024)),
    ("layers.0.mlp.experts.0.down_proj.weight", (8, 1024)),
]


def groups_of(x: Tensor, axis: int, per: int) -> Tensor:
    """The largest magnitude of each group along an axis: what a scale stands for."""
    return x.unflatten(axis, (-1, per)).abs().amax(axis + 1)


def nibbles(x: Tensor, axis: int, per: int = 2) -> Tensor:
    """Two codes a byte, the even one low."""
    even, odd = x.unflatten(axis, (-1, per)).unbind(axis + 1)
    return (even | odd << 4).to(torch.uint8)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize(("name", "shape"), LAYOUTS)
def test_all_cuts_joined_are_the_tensor(name: str, shape: tuple[int, ...], size: int) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    plan = Plan(Config.published("397B-A17B"), size)
    shards = [plan.shard(name, shape, rank) for rank in range(size)]
    assert torch.equal(join(shards, [shard.cut(tensor) for shard in shards]), tensor)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("name", "shape"), LAYOUTS[:1] + LAYOUTS[2:4] + LAYOUTS[5:])
def test_packing_and_cutting_commute(name: str, shape: tuple[int, ...], size: int) -> None:
    """Bytes of two codes, scales of 32, block scales of 128: cut then packed is packed then cut."""
    codes = (noise(*shape) * 1e6).long() % 16
    plan = Plan(Config.published("397B-A17B"), size)
    shards = [plan.shard(name, shape, rank) for rank in range(size)]
    axis = shards[0].axis
    assert axis is not None
    for per, pack in ((1, groups_of), (2, nibbles), (32, groups_of), (128, groups_of)):
        packed = pack(codes, axis, per)
        parts = [shard.cut(packed, per) for shard in shards]
        for shard, part in zip(shards, parts, strict=True):
            assert torch.equal(part, pack(shard.cut(codes), axis, per))
        assert torch.equal(join(shards, parts, per), packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_any_dtype_is_cut(dtype: torch.dtype) -> None:
    tensor = noise(12, 3).abs().to(dtype)
    shard = Shard(0, ((0, 2), (6, 8)))
    kept = tensor.view(torch.uint8).view(12, -1)[[0, 1, 6, 7]]
    assert torch.equal(shard.cut(tensor).view(torch.uint8), kept)


def test_one_range_is_cut_without_a_copy() -> None:
    """If the checkpoint is mapped, only the pages of a rank are read."""
    tensor = noise(8, 4)
    assert Shard(0, ((2, 4),)).cut(tensor).data_ptr() == tensor[2:].data_ptr()
    assert Shard(None).cut(tensor) is tensor


@pytest.mark.parametrize(
    ("ranges", "axis", "per", "message"),
    [
        (((0, 16),), 1, 32, "the range 0..16 of axis 1 is not a multiple of 32, the elements that"),
        (((16, 64),), 1, 32, "the range 16..64 of axis 1 is not a multiple of 32"),
        (((0, 4), (5, 8)), 1, 2, "the range 5..8 of axis 1 is not a multiple of 2"),
        (((4, 12),), 0, 1, "the range 4..12 of axis 0 is not in a tensor of shape [8, 64]"),
        (((64, 256),), 1, 2, "the range 64..256 of axis 1 is not in a tensor of shape [8, 64] with 2"),
        (((0, 1),), 2, 1, "the range 0..1 of axis 2 is not in a tensor of shape [8, 64]"),
    ],
)  # fmt: skip
def test_a_range_that_does_not_fit_is_refused(
    ranges: tuple[tuple[int, int], ...], axis: int, per: int, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Shard(axis, ranges).cut(noise(8, 64), per)


def test_groups_that_ranks_would_share_are_refused() -> None:
    """35B-A3B over eight ranks: 64 rows of an expert each, half a block of FP8's scales."""
    plan = Plan(Config.published("35B-A3B"), 8)
    shard = plan.shard("layers.0.mlp.experts.0.gate_proj.weight_scale_inv", (512, 2048), 1)
    assert shard.cut(noise(512, 4)).shape == (64, 4)
    with pytest.raises(InputError, match=r"64\.\.128 of axis 0 is not a multiple of 128"):
        shard.cut(noise(4, 16), per=128)


# --- errors


BIG = Config.published("397B-A17B")


@pytest.mark.parametrize(
    ("changed", "size", "message"),
    [
        ({}, 3, "tensor-parallel size 3 is not supported; known are 1, 2, 4, 8"),
        ({}, 16, "tensor-parallel size 16 is not supported; known are 1, 2, 4, 8"),
        ({}, 0, "tensor-parallel size 0 is not supported; known are 1, 2, 4, 8"),
        ({"moe_intermediate_size": 1001}, 2,
         "moe_intermediate_size = 1001 is not divisible by tensor-parallel size 2"),
        ({"shared_expert_intermediate_size": 1020}, 8,
         "shared_expert_intermediate_size = 1020 is not divisible by tensor-parallel size 8"),
        ({"vocab_size": 248077}, 2, "vocab_size = 248077 is not divisible by tensor-parallel size 2"),
        ({"linear_num_key_heads": 6, "linear_num_value_heads": 12}, 4,
         "linear_num_key_heads = 6 is not divisible by tensor-parallel size 4, nor does it divide 4"),
        ({"num_attention_heads": 12}, 8,
         "num_attention_heads = 12 is not divisible by tensor-parallel size 8"),
        ({"num_attention_heads": 48, "num_key_value_heads": 6}, 4,
         "num_key_value_heads = 6 is not divisible by tensor-parallel size 4, nor does it divide 4"),
        ({"mlp_only_layers": (0,), "intermediate_size": 90}, 4,
         "intermediate_size = 90 is not divisible by tensor-parallel size 4"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_divide(changed: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        Plan(replace(BIG, **changed), size)


def test_grouped_projections_of_shared_key_heads_are_refused() -> None:
    """Qwen3-Next stores a key head beside all value heads that it serves, of which a rank needs some."""
    plan = Plan(replace(BIG, linear_num_key_heads=2), 4)
    assert plan.rank_config().linear_num_key_heads == 1
    assert plan.shard("layers.0.linear_attn.in_proj_a.weight", (64, 1), 1).ranges == ((16, 32),)
    for name, rows in (("qkvz", 2 * 2 * 128 + 2 * 64 * 128), ("ba", 2 * 64)):
        with pytest.raises(
            InputError, match=r"linear_num_key_heads = 2 is not divisible by .* size 4"
        ):
            plan.shard(f"layers.0.linear_attn.in_proj_{name}.weight", (rows, 1), 1)


def test_a_node_is_summed_where_a_product_is_cut_along_its_sum() -> None:
    """The line of nodes that the ranks add up, against the table of matrices."""
    plan = Plan(BIG, 8)
    for names, axis, sections in TABLE:
        if not sections or not names.startswith("layers"):
            continue
        node = ".".join(names.replace("N", "0").split(".")[:3])
        summed_axis = 2 if names.endswith("experts.down_proj") else 1
        is_along = axis == summed_axis and not names.endswith("gate_up_proj")
        assert plan.is_summed(node), names
        assert is_along == bool(re.search(r"(down_proj|out_proj|o_proj)", names)), names
    assert plan.is_summed("mtp.layers.0.mlp") and not plan.is_summed("layers.0.mlp.experts")
    assert not plan.is_summed("layers.0") and not plan.is_summed("lm_head")
    assert not Plan(BIG, 1).is_summed("layers.0.mlp")


def test_a_size_that_nothing_has_need_not_divide() -> None:
    """Qwen3-Next states an intermediate_size, and has no dense layer."""
    plan = Plan(replace(BIG, intermediate_size=5121, shared_expert_intermediate_size=0), 8)
    assert plan.rank_config().intermediate_size == 5121
    assert plan.rank_config().shared_expert_intermediate_size == 0
    name = "layers.0.mlp.gate_proj.weight"
    message = f"{name} is cut along intermediate_size, which this config does not use"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        plan.shard(name, (5121, 4096), 0)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.mlp.experts.7.gate_proj.bias",
        "layers.0.mlp.experts.gate_proj.weight",
        "layers.0.mlp.gate_up_proj.weight",
        "layers.x.mlp.gate.weight",
        "layers.0.self_attn.qkv_proj.weight",
        "layers.0.self_attn.k_proj.weight_zero",
        "layers.0.self_attn.q_norm",
        "draft.layers.0.mlp.gate.weight",
        "mtp.embed_tokens.bias",
        "model.model.norm.weight",
        "",
    ],
)
def test_a_name_without_a_line_is_refused(name: str) -> None:
    with pytest.raises(
        InputError, match=re.escape(f"{name}: the tensor-parallel plan has no line")
    ):
        Plan(BIG, 8).shard(name, (1024, 4096), 0)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize(
    ("name", "shape", "axis", "expected"),
    [
        ("layers.0.linear_attn.in_proj_qkv.weight", (8192, 4096), 0, 12288),
        ("layers.0.mlp.experts.1.down_proj.weight", (4096, 512), 1, 1024),
        ("layers.0.mlp.experts.gate_up_proj", (512, 1024, 4096), 1, 2048),
        ("layers.0.mlp.experts.down_proj", (4096, 1024), 2, 1024),
        ("lm_head.weight", (248077, 4096), 0, 248320),
    ],
)
def test_a_shape_against_the_config_is_refused(
    name: str, shape: tuple[int, ...], axis: int, expected: int, size: int
) -> None:
    message = f"{name} has shape {list(shape)}; the config needs {expected} on axis {axis}"
    with pytest.raises(InputError, match=re.escape(message)):
        Plan(BIG, size).shard(name, shape, 0)


@pytest.mark.parametrize("rank", [-1, 4, 8])
def test_a_rank_outside_the_group_is_refused(rank: int) -> None:
    with pytest.raises(InputError, match=rf"rank {rank} is not in 0\.\.3"):
        Plan(BIG, 4).shard("norm.weight", (4096,), rank)
