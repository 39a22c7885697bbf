"""The feed-forward for the rows of a prompt: mixture of experts (MoE), or dense MLP."""

import math
from typing import Any

import torch
from torch import Tensor

from fast.launch import Launch, Scratch, Work, constants, options
from fast.prefill.linear import product
from fast.prefill.tiles import expert_rows, tiles
from fast.router import Choice, power_of_two
from fast.target import check_width

ROW_BLOCK = 1024  # columns of a row that one program handles
SORT_BLOCK = 256  # pairs of a row and a slot that one program sorts


def route(router: Any, x: Tensor, filled: Tensor, scratch: Scratch) -> tuple[list[Work], Choice]:
    """The work of a `fast.router.Router` for x [N, D] bf16, and the choice, which is filled when it
    runs. filled [1] int32, here and below: the number of rows, as in `Span`.

    `parts` of the choice is the product with the router's whole matrix, [1, N, M] fp32.
    """
    from fast.kernels.prefill import moe as kernels  # Triton is needed from here on

    N, k = len(x), router.top_k
    router.check()
    first, logits = product(
        x, router.weight, router.target, scratch, filled, name="router", dtype=torch.float32
    )
    choice = Choice(
        scratch("experts", N, k, dtype=torch.int32),
        scratch("expert weights", N, k, dtype=torch.float32),
        logits[None],
    )
    second = Launch(
        f"prefill choose E={router.E}",
        kernels.choose,
        (math.ceil(N / kernels.TOGETHER.value), 1, 1),
        {
            "logits": logits, "experts": choice.experts, "weights": choice.weights, "filled": filled,
            "N": logits.shape[1], "E": router.E, "TOP_K": k, "NORM": router.norm,
            "BLOCK_E": power_of_two(router.E),
        },
        {"num_warps": 4},
    )  # fmt: skip
    return [first, second], choice


def experts(
    node: Any, x: Tensor, chosen: Tensor, weights: Tensor, filled: Tensor, scratch: Scratch, *,
    shared: tuple[Tensor, Tensor, Tensor] | None = None, residual: Tensor | None = None,
) -> tuple[list[Work], Tensor]:  # fmt: skip
    """The work of a `fast.moe.Experts`: the weighted sum of each row's experts, [N, D] bf16. It is
    filled when the work runs.

    chosen [N, k] int32, weights [N, k] fp32. shared: the shared expert's activation [N, I] bf16,
    its down weight [D, I] bf16, and the router's product [N, M] fp32, whose column E is the shared
    expert's gate. residual [N, D] bf16.
    """
    from fast.kernels.prefill import moe as kernels  # Triton is needed from here on

    N, k = chosen.shape
    E, D, I, target = node.E, node.D, node.I, node.target
    check_width("experts", x, D)
    pairs = N * k
    kind = "grouped" if node.fp4 else "grouped bf16"
    few = {"BLOCK_M": expert_rows(target, pairs / E)} if node.fp4 else {}
    first = tiles(target, kind, BLOCK_N=2 * I, BLOCK_K=D) | few
    second = tiles(target, kind, BLOCK_N=D, BLOCK_K=I) | few
    sort = Sort(chosen, E, first["BLOCK_M"], filled, scratch)
    hidden = scratch("pairs hidden", pairs, I)
    by_pair = scratch("pairs down", pairs, D)
    shape = f"D={D} I={I}" + ("" if node.fp4 else " bf16")

    def grouped(
        name: str, config: dict[str, int], source: Tensor, weight: Tensor, scale: Tensor,
        out: Tensor, **more: Any,
    ) -> Launch:  # fmt: skip
        return Launch(
            f"prefill {name} {shape}",
            kernels.grouped,
            (more["N"] // config["BLOCK_N"], len(sort.tile_expert), 1),
            {
                "x": source, "order": sort.order, "tile_expert": sort.tile_expert,
                "tile_first": sort.tile_first, "expert_first": sort.expert_first,
                "weight": weight, "scale": scale, "out": out, "pairs": pairs, "E": E,
                "FP4": node.fp4, **more, **constants(config),
            },
            options(config),
        )  # fmt: skip

    source, arrange = x, []
    if node.fp4 and target == "sm_90":  # see kernels/mxfp4.py
        source = scratch("arranged", N, D)
        block = min(ROW_BLOCK, power_of_two(D))
        arrange = [
            Launch(
                f"prefill arrange D={D}",
                kernels.arrange,
                (N, math.ceil(D / block), 1),
                {"x": x, "out": source, "D": D, "BLOCK": block},
                {"num_warps": 4},
            )
        ]
    gate_up = grouped(
        "gate_up", first, source, node.gate_up, node.gate_up_scale, hidden,
        N=2 * I, K=D, TOP_K=k, ACTIVATED=True, TILE_N=node.tile_n, TILE_K=node.tile_k,
    )  # fmt: skip
    down = grouped(
        "down", second, hidden, node.down, node.down_scale, by_pair,
        N=D, K=I, TOP_K=0, ACTIVATED=False, TILE_N=1, TILE_K=I,
    )  # fmt: skip
    work: list[Work] = [*sort.work, *arrange, gate_up, down]
    own, logits = x, weights
    if shared is not None:
        activated, down_weight, logits = shared
        last, own = product(activated, down_weight, target, scratch, filled, name="shared_down")
        work.append(last)
    out = scratch("feed-forward", N, D)
    total = Launch(
        f"prefill combine D={D}",
        kernels.combine,
        (N, math.ceil(D / ROW_BLOCK), 1),
        {
            "by_pair": by_pair, "place_of_pair": sort.place_of_pair, "weights": weights,
            "logits": logits, "shared": own, "residual": x if residual is None else residual,
            "out": out, "filled": filled, "N": logits.shape[1], "D": D, "TOP_K": k, "GATE": E,
            "HAS_SHARED": shared is not None, "HAS_RESIDUAL": residual is not None,
            "BLOCK": min(ROW_BLOCK, power_of_two(D)),
        },
        {"num_warps": 4},
    )  # fmt: skip
    return [*work, total], out


class Sort:
    """Sorts the pairs (row, slot) by expert.

    work: the launches that do it. chosen [N, k] int32; pairs = N k. order [pairs] int32: the pair at
    each place. place_of_pair [pairs] int32: the place of each pair. expert_first [E + 1] int32: the
    first place of each expert. A tile is up to `block` pairs of one expert. tile_expert [tiles] int32:
    its expert, or E for an unused tile. tile_first [tiles] int32: its first place. The order of an
    expert's pairs is not always the same, which changes no bits of their results.
    """

    def __init__(
        self, chosen: Tensor, E: int, block: int, filled: Tensor, scratch: Scratch
    ) -> None:
        from fast.kernels.prefill import moe as kernels  # Triton is needed from here on

        pairs = chosen.numel()
        tiles = min(pairs, pairs // block + E)  # the last tile of an expert may be partial

        def integers(name: str, count: int) -> Tensor:
            return scratch(name, count, dtype=torch.int32)

        self.order, self.place_of_pair = integers("pair order", pairs), integers("places", pairs)
        self.expert_first = integers("expert first", E + 1)
        self.tile_expert = integers("tile expert", tiles)
        self.tile_first = integers("tile first", tiles)
        counts = integers("expert counts", E + 1)
        common = {
            "chosen": chosen, "ranks": integers("pair ranks", pairs), "expert_first": self.expert_first,
            "filled": filled, "E": E, "TOP_K": chosen.shape[1], "BLOCK": SORT_BLOCK,
        }  # fmt: skip
        grid = math.ceil(pairs / SORT_BLOCK), 1, 1
        count = Launch(
            f"prefill count E={E}",
            kernels.count,
            grid,
            {
                **common, "counts": counts, "tile_expert": self.tile_expert, "tiles": tiles,
                "tile_first": self.tile_first, "BLOCK_E": power_of_two(E), "TILE": block,
            },
            {"num_warps": 4},
        )  # fmt: skip
        place = Launch(
            f"prefill place E={E}",
            kernels.place,
            grid,
            {**common, "order": self.order, "place_of_pair": self.place_of_pair},
            {"num_warps": 4},
        )
        self.work: list[Work] = [counts.zero_, count, place]


def block(
    node: Any, x: Tensor, filled: Tensor, scratch: Scratch, *, residual: Tensor | None = None
) -> tuple[list[Work], Tensor]:
    """The work of a `fast.moe.SparseMoeBlock` for x [N, D] bf16, and its output [N, D] bf16."""
    from fast.kernels.prefill import moe as kernels  # Triton is needed from here on

    work, choice = route(node.gate, x, filled, scratch)
    shared = None
    if node.shared_down is not None:
        I, logits = node.shared_down.shape[1], choice.parts[0]
        hidden = scratch("shared hidden", len(x), I)
        shared = hidden, node.shared_down, logits
        work.append(
            Launch(
                f"prefill activate I={I}",
                kernels.activate,
                (len(x), 1, 1),
                {
                    "logits": logits, "out": hidden, "filled": filled, "N": logits.shape[1],
                    "FIRST": node.gate.E + 1, "I": I, "BLOCK": min(ROW_BLOCK, power_of_two(I)),
                },
                {"num_warps": 4},
            )
        )  # fmt: skip
    routed, out = experts(
        node.experts, x, choice.experts, choice.weights, filled, scratch,
        shared=shared, residual=residual,
    )  # fmt: skip
    return [*work, *routed], out


def mlp(
    node: Any, x: Tensor, filled: Tensor, scratch: Scratch, *, residual: Tensor | None = None
) -> tuple[list[Work], Tensor]:
    """The work of a `fast.moe.MLP` for x [N, D] bf16, and its output [N, D] bf16."""
    first, hidden = product(
        x, node.gate_up, node.target, scratch, filled, name="mlp_gate_up", activated=True
    )
    second, out = product(
        hidden, node.down, node.target, scratch, filled, name="mlp_down", residual=residual
    )
    return [first, second], out
