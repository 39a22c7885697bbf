"""The router for 1 to 8 rows, alone or as one product with the shared expert's gate-up."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fast import configs
from fast.launch import Launch, constants, options, run
from fast.target import ROWS, check_rows, target_of
from qwen35.errors import InputError

MAX_TOP_K = 16  # slots of the kernel that chooses


@dataclass(frozen=True)
class Choice:
    """What the router's launches write.

    experts [N, k] int32 and weights [N, k] fp32; of the shared expert, where there is one, hidden [N, I]
    bf16 (silu(gate) * up) and shared_gate [N] fp32 (the sigmoid).
    """

    experts: Tensor
    weights: Tensor
    hidden: Tensor
    shared_gate: Tensor


class Router(nn.Module):
    """x [N, D] bf16 -> the chosen experts [N, k] int64, best first, their weights [N, k] fp32; N to 8.

    Logits are rounded to bf16, as the reference's are, and ties go to the lower index. weight [M, D]
    bf16: the E rows of the router; with a shared expert also the row that opens it, I gate and I up rows.
    """

    def __init__(self, weight: Tensor, E: int, top_k: int, norm: bool, target: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.E, self.top_k, self.norm, self.target = E, top_k, norm, target
        self.I = (len(weight) - E) // 2  # of the shared expert

    @classmethod
    def from_reference(
        cls,
        module: Any,
        target: str | None = None,
        shared: Any = None,
        shared_gate: Any = None,
    ) -> "Router":
        """From `reference.moe.Router`, and the block's shared expert and its gate.

        target: the device's own when not given.
        """
        rows: list[Tensor] = [in_bf16(module)]
        if shared is not None and shared_gate is not None:
            rows += [in_bf16(part) for part in (shared_gate, shared.gate_proj, shared.up_proj)]
        target = target or target_of(module.weight.device)
        return cls(torch.cat(rows), len(rows[0]), module.top_k, module.norm_topk_prob, target)

    def launches(self, x: Tensor) -> tuple[list[Launch], Choice]:
        """What `forward` launches, and what that writes, not written yet."""
        from fast.kernels import router  # Triton is needed from here on

        M, D = self.weight.shape
        if not 1 <= self.top_k <= min(MAX_TOP_K, self.E):
            raise InputError(
                f"the router's top {self.top_k} of {self.E} experts; "
                f"expected 1 to {min(MAX_TOP_K, self.E)}"
            )
        check_rows("the router", x, D)
        N = len(x)
        multiply, parts = product(x, self.weight, self.target)
        float32 = {"dtype": torch.float32, "device": x.device}
        choice = Choice(
            torch.empty(N, self.top_k, dtype=torch.int32, device=x.device),
            torch.empty(N, self.top_k, **float32),
            x.new_empty(N, self.I),
            torch.empty(N, **float32),
        )
        choose = Launch(
            f"choose {configs.key(E=self.E, I=self.I)}",
            router.choose,
            (N, 2 if self.I else 1, 1),
            {
                "parts": parts, "experts": choice.experts, "weights": choice.weights,
                "hidden": choice.hidden, "shared_gate": choice.shared_gate, "rows": N, "N": M,
                "E": self.E, "TOP_K": self.top_k, "NORM": self.norm, "I": self.I,
                "SPLITS": len(parts), "BLOCK_E": _power_of_two(self.E),
                "BLOCK_I": _power_of_two(max(self.I, 1)),
            },
            configs.lookup(self.target, "choose", configs.key(E=self.E)),
        )  # fmt: skip
        return [multiply, choose], choice

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        launches, choice = self.launches(x)
        run(launches, x.device)
        return choice.experts.long(), choice.weights

    def extra_repr(self) -> str:
        shared = f", and a shared expert of {self.I}" if self.I else ""
        return f"{self.weight.shape[1]} -> top {self.top_k} of {self.E}{shared}, {self.target}"


def product(
    x: Tensor, weight: Tensor, target: str, *, gain: Tensor | None = None
) -> tuple[Launch, Tensor]:
    """x [N, K] bf16, weight [M, K] bf16 -> [splits, N, M] fp32, parts of x W^T that are to be added.

    gain [N] fp32: a factor for each row; there is one part then.
    """
    from fast.kernels import router  # Triton is needed from here on

    M, K = weight.shape
    if K % 16:
        raise InputError(f"a product along {K} elements; the matrix unit takes multiples of 16")
    config = configs.lookup(target, "linear", configs.key(N=M, K=K))
    config = config | {"BLOCK_K": math.gcd(config["BLOCK_K"], K)}
    # What is multiplied afterwards has to be whole.
    splits = 1 if gain is not None else math.gcd(config["SPLITS"], K // config["BLOCK_K"])
    out = torch.empty(splits, len(x), M, dtype=torch.float32, device=x.device)
    launch = Launch(
        f"linear {configs.key(N=M, K=K)}",
        router.linear,
        (-(-M // config["BLOCK_N"]), splits, 1),
        {
            "x": x, "weight": weight, "gain": out if gain is None else gain, "out": out,
            "rows": len(x), "N": M, "K": K, "HAS_GAIN": gain is not None, "ROWS": ROWS[target],
            **constants(config), "SPLITS": splits,
        },
        options(config),
        config["BLOCK_N"] * config["BLOCK_K"] * 2,
    )  # fmt: skip
    return launch, out


def in_bf16(module: Any) -> nn.Parameter:
    """A layer's weight [N, K], which has to be floating point."""
    weight = module.weight
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise InputError(f"a weight in {weight.dtype}; the router and the shared expert need bf16")
    return nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
