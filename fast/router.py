"""The router. For 1 to 8 rows it is one launch, which may include the norm before it and the shared
expert's gate-up product."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fast import configs, router_hip
from fast.launch import Launch, Scratch, constants, options, run
from fast.linear import Stream, in_bf16, read_normed, stacked
from fast.target import MAX_ROWS, ROWS, check_kernel, check_rows, target_of
from qwen35.errors import InputError

MAX_TOP_K = 16  # the most slots that the kernels are tested with


@dataclass(frozen=True)
class Choice:
    """What the router's launch writes.

    experts [N, k] int32 and weights [N, k] fp32. parts [splits, N, M] fp32: partial sums over K of
    M = E + 1 + 2 I columns: E logits, the shared expert's gate, and the I gates and I ups of its gate-up
    product. Without a shared expert, M = E.
    """

    experts: Tensor
    weights: Tensor
    parts: Tensor


class Router(nn.Module):
    """x [N, D] bf16, any N -> the chosen experts [N, k] int64, best first, and their weights [N, k] fp32.

    Logits are rounded to bf16, as the reference's are, and ties go to the lower index. weight [M, D]
    bf16: the E rows of the router; with a shared expert, also the row of its gate, I gate rows and I up
    rows. kernel: for up to 8 rows, "triton" or, on gfx950 alone, "hip" (router_hip.py).
    """

    def __init__(
        self,
        weight: Tensor,
        E: int,
        top_k: int,
        norm: bool,
        target: str,
        kernel: str = "triton",
    ) -> None:
        super().__init__()
        check_kernel("a router", kernel)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.E, self.top_k, self.norm, self.target, self.kernel = E, top_k, norm, target, kernel
        self.I = (len(weight) - E) // 2  # of the shared expert
        if kernel == "hip":
            router_hip.check(self)

    @classmethod
    def from_reference(
        cls,
        module: Any,
        target: str | None = None,
        shared: Any = None,
        shared_gate: Any = None,
        kernel: str = "triton",
    ) -> "Router":
        """Replaces a `reference.moe.Router`; with shared and shared_gate, its launch also computes the
        shared expert's gate and gate-up product. target: default, that of the weights' device."""
        E = len(module.weight)
        if shared is None or shared_gate is None:
            weight = in_bf16(module)
        else:
            weight = stacked(module, shared_gate, shared.gate_proj, shared.up_proj)
        target = target or target_of(module.weight.device)
        return cls(weight, E, module.top_k, module.norm_topk_prob, target, kernel)

    def check(self) -> None:
        """InputError for sizes that no kernel takes."""
        most, D = min(MAX_TOP_K, self.E), self.weight.shape[1]
        if not 1 <= self.top_k <= most:
            raise InputError(
                f"the router's top {self.top_k} of {self.E} experts; expected 1 to {most}"
            )
        if D % 16:
            raise InputError(f"a router of hidden size {D}; the matrix unit takes multiples of 16")

    def launch(self, x: Tensor | Stream, scratch: Scratch) -> tuple[Launch, Choice]:
        """The launch of `forward`, and the buffers that it will write. x: a stream is normalised first.

        InputError when top_k or D is a size that the kernel does not take.
        """
        self.check()
        M, D = self.weight.shape
        reads = read_normed(x)
        check_rows("the router", reads["x"], D)
        N = len(reads["x"])

        def choice_of(splits: int) -> Choice:
            return Choice(
                scratch("experts", N, self.top_k, dtype=torch.int32),
                scratch("expert weights", N, self.top_k, dtype=torch.float32),
                scratch("router parts", splits, N, M, dtype=torch.float32),
            )

        if self.kernel == "hip":
            choice = choice_of(router_hip.splits(D))
            return router_hip.launch(self, reads, choice, scratch), choice
        from fast.kernels import router as kernels  # Triton is needed from here on

        config = configs.lookup(self.target, "route", configs.key(N=M, K=D))
        config = config | {"BLOCK_K": math.gcd(config["BLOCK_K"], D)}
        splits = math.gcd(config["SPLITS"], D // config["BLOCK_K"])
        choice = choice_of(splits)
        launch = Launch(
            f"route {configs.key(N=M, K=D, E=self.E)}",
            kernels.route,
            (-(-M // config["BLOCK_N"]), splits, 1),
            {
                **reads, "weight": self.weight,
                "parts": choice.parts,
                "arrived": scratch("router arrived", 1, dtype=torch.int32),
                "experts": choice.experts, "weights": choice.weights, "rows": N, "N": M,
                "K": D,
                "E": self.E, "TOP_K": self.top_k, "NORM": self.norm,
                "BLOCK_E": power_of_two(self.E),
                "ROWS": ROWS[self.target], **constants(config), "SPLITS": splits,
            },
            options(config),
            config["BLOCK_N"] * config["BLOCK_K"] * 2,
        )  # fmt: skip
        return launch, choice

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scratch = Scratch(x.device)
        if len(x) > MAX_ROWS:
            from fast.prefill import moe as prefill  # which needs this file
            from fast.prefill.span import number_of_rows

            work, choice = prefill.route(self, x, number_of_rows(x), scratch)
        else:
            launch, choice = self.launch(x, scratch)
            work = [launch]
        run(work, x.device)
        return choice.experts.long(), choice.weights

    def extra_repr(self) -> str:
        shared = f", and a shared expert of {self.I}" if self.I else ""
        kind = f"{shared}, HIP" if self.kernel == "hip" else shared
        return f"{self.weight.shape[1]} -> top {self.top_k} of {self.E}{kind}, {self.target}"


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
