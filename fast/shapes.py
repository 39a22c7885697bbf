"""Checks whether the kernels take a model's sizes, before any weight is read."""

from fast import moe_hip
from fast.router import MAX_TOP_K
from fast.state import RING
from qwen35.config import Config
from qwen35.errors import InputError

MOST_HEADS = 32  # query heads per key head: four rows of them fill a block of 128


def check_shapes(config: Config) -> None:
    """InputError, with the name and the value, if a size of the model is one that no kernel takes."""
    for name in ("head_dim", "linear_key_head_dim", "linear_value_head_dim"):
        size = getattr(config, name)
        if size & (size - 1) or not 16 <= size <= 256:
            raise InputError(f"{name} = {size}; the fast path takes powers of two from 16 to 256")
    shared = config.num_attention_heads // config.num_key_value_heads
    limits = {
        "num_attention_heads / num_key_value_heads": (shared, MOST_HEADS),
        "linear_conv_kernel_dim": (config.linear_conv_kernel_dim, RING - 8 + 1),
        "num_experts_per_tok": (config.num_experts_per_tok, MAX_TOP_K),
    }
    for name, (size, most) in limits.items():
        if size > most:
            raise InputError(f"{name} = {size}; the fast path takes at most {most}")
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": 0 if config.num_experts else config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size if config.num_experts else 0,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
    }
    for name, size in widths.items():
        if size % 16:
            raise InputError(f"{name} = {size}; the fast path takes multiples of 16")


def check_hip(config: Config) -> None:
    """InputError if a model's mixture of experts is one that the HIP kernels do not take."""
    if not config.num_experts:
        raise InputError("the HIP kernels are of a mixture of experts; this model is dense")
    moe_hip.check_sizes(config.hidden_size, config.shared_expert_intermediate_size)
