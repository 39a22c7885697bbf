"""Chooses how many tokens of a prompt go through the model in one pass."""

import torch

from qwen35.config import Config
from qwen35.parallel.nodes import ranks_of
from reference.linear import GRID
from reference.model import Model

# On the fast path, a GPU would wait for the host in shorter passes. On the reference path, longer
# passes are not faster.
LARGEST = {"fast": 8192, "reference": 2048}


def chosen_chunk(model: Model, path: str) -> int:
    """The default for the prompt tokens per pass, a multiple of 64.

    It is `LARGEST` of the path, or less if a GPU has too little free memory for that. Ranks agree on
    one number, because they make the same passes.
    """
    chunk, device = LARGEST[path], model.embed_tokens.weight.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        while chunk > GRID and chunk * row_bytes(model.config) > free + unused:
            chunk //= 2
    return min(ranks_of(model).exchange(chunk))


def row_bytes(config: Config) -> int:
    """Estimate twice the bytes that a pass holds at a time for each of its rows, in the layer that needs
    most and in bfloat16."""
    D, k = config.hidden_size, config.num_experts_per_tok
    mixer = 6 * (config.conv_dim + config.linear_num_value_heads * config.linear_value_head_dim)
    attention = 4 * config.num_attention_heads * config.head_dim
    pairs = k * (D + config.moe_intermediate_size) if config.num_experts else 0
    router = 2 * (config.num_experts + 2 * config.shared_expert_intermediate_size)
    dense = 0 if config.num_experts else 2 * config.intermediate_size
    return 2 * 2 * (8 * D + mixer + attention + pairs + router + dense)
