"""Times nodes of a prefill pass beside other libraries: delta rule, routed experts and attention.

The launches of one of our nodes are one captured graph, and so is the other library's call; the two
take turns. They do not compute quite the same, and ours never does less: its delta rule includes the
gated norm, and its attention the gate. Importing this module needs Triton.
"""

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from fast.launch import Launch, Scratch, Work
from fast.prefill import moe
from fast.prefill.span import number_of_rows
from qwen35.config import FAMILY, PUBLISHED
from tools.bench import gpu, mixture, report
from tools.bench.moe import guarded

DELTA_RULE = ("solve", "scan", "read")  # the kernels after the convolution
Call = Callable[[], object]


def kernels_of(work: Sequence[Work], names: Sequence[str]) -> list[Launch]:
    """The launches of the kernels of these names, in order."""
    return [one for one in work if isinstance(one, Launch) and one.kernel.__name__ in names]


def delta_rule(work: Sequence[Work]) -> tuple[Call, Call]:
    """Ours and `fla`'s chunked delta rule, over random queries, keys and values of the same sizes."""
    from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
        chunk_gated_delta_rule,
    )

    launches = kernels_of(work, DELTA_RULE)
    a = next(one for one in launches if one.kernel.__name__ == "read").arguments
    N, H, HV, K, V = len(a["out"]), *(a[name] for name in ("H", "HV", "K", "V"))
    device = a["out"].device
    q, k = (
        F.normalize(torch.randn(1, N, H, K, device=device), dim=-1).bfloat16() for _ in range(2)
    )
    v = torch.randn(1, N, HV, V, device=device).bfloat16()
    g = F.logsigmoid(torch.randn(1, N, HV, device=device))
    beta = torch.rand(1, N, HV, device=device).bfloat16()
    state = torch.zeros(1, HV, K, V, device=device)

    def theirs() -> object:
        return chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=state, output_final_state=True
        )

    return lambda: [one() for one in launches], theirs


def experts(node: Any, tokens: int, top_k: int) -> tuple[Call, Call]:
    """Ours and `triton_kernels`' routed experts, from the chosen ids to the sum of each row."""
    from tools.bench.moe_peers import TritonKernels

    device = node.gate_up.device
    generator = torch.Generator(device).manual_seed(0)
    case = mixture.random_case(tokens, node.D, node.E, top_k, generator)
    rows = number_of_rows(case.x)
    work, _ = moe.experts(node, case.x, case.experts, case.shares, rows, Scratch(device))
    theirs = TritonKernels(mixture.random_weights(node.E, node.D, node.I, generator))
    return lambda: [one() for one in work], theirs.from_ids(case)


def attention(work: Sequence[Work]) -> tuple[Call, Call]:
    """Ours and torch's `scaled_dot_product_attention`, over the same numbers in bf16. Ours includes the
    decoding of a cache in e4m3."""
    launches = kernels_of(work, ["decode", "attend", "join"])
    a = kernels_of(work, ["attend"])[0].arguments
    rows = len(a["q"])
    end = int(a["start"]) + rows
    q = a["q"].transpose(0, 1)[None]
    shared = a["H"] // a["G"]
    # Repeated beforehand, since the flash kernel does not take grouped heads with this mask.
    k, v = (a[name][None, :, :end].repeat_interleave(shared, 1) for name in ("keys", "values"))
    mask = causal_lower_right(rows, end)

    def theirs() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return lambda: [one() for one in launches], theirs


def in_transformers(name: str, device: torch.device) -> Any:
    """A published model of that size in the transformers library, with random weights in bf16."""
    import transformers

    made = dict(FAMILY | PUBLISHED[name])
    config = transformers.AutoConfig.for_model(made.pop("model_type"), **made)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def whole_model(name: str, ours_us: float, ids: Tensor, repeats: int) -> report.Row:
    """The row of a whole pass with an empty cache. ours_us: our time. Theirs also includes the head, for
    the last row alone."""
    model = in_transformers(name, ids.device)
    first, second = (
        statistics.median(gpu.events(lambda: model(ids, use_cache=True, logits_to_keep=1), repeats))
        for _ in range(2)
    )
    return {
        "name": "whole model", "us": ours_us, "peer": "transformers", "peer_us": first,
        "peer_us_again": second, "peer_over_ours": first / ours_us,
    }  # fmt: skip


def compared(name: str, peer: str, pair: tuple[Call, Call], repeats: int) -> report.Row:
    """The row of two calls: medians in microseconds, two passes in turns."""
    graphs = [gpu.Graph([call]) for call in pair]
    first, second = ([statistics.median(g.microseconds(repeats)) for g in graphs] for _ in range(2))
    return {
        "name": name, "us": first[0], "us_again": second[0], "peer": peer, "peer_us": first[1],
        "peer_us_again": second[1], "peer_over_ours": first[1] / first[0],
    }  # fmt: skip


def rows_of_nodes(
    linear: Sequence[Work], full: Sequence[Work], node: Any, tokens: int, top_k: int, repeats: int
) -> list[report.Row]:
    """The rows of all nodes' peers that can be built here. linear, full: the work of a layer of each
    kind. node: its `fast.moe.Experts`, or None."""
    found: list[report.Row] = []

    def add(name: str, peer: str, pair: Callable[[], tuple[Call, Call]]) -> None:
        guarded(peer, lambda: found.append(compared(name, peer, pair(), repeats)))

    if importlib.util.find_spec("fla") is not None:
        add("delta rule", "fla", lambda: delta_rule(linear))
    if node is not None and node.fp4 and importlib.util.find_spec("triton_kernels") is not None:
        add("routed experts", "triton_kernels", lambda: experts(node, tokens, top_k))
    add("attend", "scaled_dot_product_attention", lambda: attention(full))
    return found


def row_of_model(name: str, us: float, ids: Tensor, repeats: int) -> list[report.Row]:
    """The row of `whole_model`, if the transformers library is installed and builds the model."""
    found: list[report.Row] = []
    if importlib.util.find_spec("transformers") is not None:
        guarded("transformers", lambda: found.append(whole_model(name, us, ids, repeats)))
    return found
