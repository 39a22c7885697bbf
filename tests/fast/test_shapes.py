"""Sizes that the kernels take, each at its limit."""

from dataclasses import replace
from typing import Any

import pytest

from fast.shapes import check_hip, check_shapes
from qwen35.config import Config
from qwen35.errors import InputError

MOE, DENSE = Config.published("397B-A17B"), Config.published("27B")


def refused(config: Config, **change: Any) -> str:
    with pytest.raises(InputError) as raised:
        check_shapes(replace(config, **change))
    return str(raised.value)


@pytest.mark.parametrize("name", ["head_dim", "linear_key_head_dim", "linear_value_head_dim"])
def test_head_sizes_are_powers_of_two(name: str) -> None:
    for size in (16, 256):
        check_shapes(replace(MOE, partial_rotary_factor=0.5, **{name: size}))
    for size in (8, 48, 512):
        line = f"{name} = {size}; the fast path takes powers of two from 16 to 256"
        assert refused(MOE, partial_rotary_factor=0.5, **{name: size}) == line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 64}, "num_attention_heads / num_key_value_heads = {}"),
        ({"linear_conv_kernel_dim": 9}, "linear_conv_kernel_dim = {}"),
        ({"num_experts_per_tok": 16}, "num_experts_per_tok = {}"),
    ],
)
def test_limits(change: dict[str, int], said: str) -> None:
    check_shapes(replace(MOE, **change))
    ((name, most),) = change.items()
    step = MOE.num_key_value_heads if name == "num_attention_heads" else 1
    value, most = ((n // step) for n in (most + step, most))
    line = f"{said.format(value)}; the fast path takes at most {most}"
    assert refused(MOE, **{name: value * step}) == line


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (MOE, "hidden_size"),
        (MOE, "moe_intermediate_size"),
        (MOE, "shared_expert_intermediate_size"),
        (DENSE, "hidden_size"),
        (DENSE, "intermediate_size"),
    ],
)
def test_widths_are_multiples_of_16(config: Config, name: str) -> None:
    check_shapes(replace(config, **{name: 1040}))
    line = f"{name} = 1032; the fast path takes multiples of 16"
    assert refused(config, **{name: 1032}) == line


def test_sizes_that_a_model_does_not_use_may_be_any() -> None:
    check_shapes(replace(MOE, intermediate_size=1032))
    check_shapes(replace(DENSE, moe_intermediate_size=1032))


def test_what_the_hip_kernels_take() -> None:
    check_hip(MOE)
    with pytest.raises(InputError) as raised:
        check_hip(DENSE)
    assert str(raised.value) == ("the HIP kernels are of a mixture of experts; this model is dense")
    with pytest.raises(InputError, match="of hidden size 1152; expected a multiple"):
        check_hip(replace(MOE, hidden_size=1152))
    with pytest.raises(InputError, match="intermediate size 48; expected a multiple of 32"):
        check_hip(replace(MOE, shared_expert_intermediate_size=48))
