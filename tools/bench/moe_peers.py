"""The routed experts of `triton_kernels` (PyPI: tokenspeed-triton-kernels) and of plain torch.

Only the matrix products are launches of `triton_kernels`, in its MXFP4 layout for Hopper. gate-up
has a fused activation (SiLU times up). The activation is written here, because that of the library
has other constants. down multiplies by the pairs' weights and scatters. torch sorts the pairs and
sums them, because the library's top-k needs a power of two, and its `reduce` does not compile with
Triton 3.6. Importing this module needs Triton.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import target_info

from tools.bench.mixture import Case, Weights
from weights import mxfp4

WARPS = 4  # warps that the library's layout of the scales is made for; 8 are slower here

Call = Callable[[], Tensor]  # one call on fixed inputs, -> [N, D] bf16


@triton.jit(repr=lambda _: "_silu_up")
def _silu_up(both):
    """silu(gate) * up. The columns of `both` are gate 0, up 0, gate 1, up 1, ..."""
    gate, up = tl.split(tl.reshape(both, (both.shape[0], both.shape[1] // 2, 2)))
    return gate / (1 + tl.exp(-gate)) * up


@triton.constexpr_function
def _no():
    return False


def library() -> Any:
    """Import `triton_kernels` and the submodules that are used. Names that it expects from a later
    Triton are added to Triton first."""
    later = {
        (target_info, "is_hip_gfx1250"): _no,  # for another GPU
        (triton.runtime.JITFunction, "def_file_line_number"): 1,  # for tracebacks
        (triton.runtime.JITFunction, "def_file_col_number"): 1,
    }
    for (owner, name), value in later.items():
        if not hasattr(owner, name):
            setattr(owner, name, value)
    import triton_kernels  # pyright: ignore[reportMissingImports]
    import triton_kernels.matmul  # pyright: ignore[reportMissingImports]
    import triton_kernels.specialize  # pyright: ignore[reportMissingImports]
    import triton_kernels.tensor  # pyright: ignore[reportMissingImports]
    import triton_kernels.tensor_details.layout  # pyright: ignore[reportMissingImports]

    return triton_kernels


@dataclass(frozen=True)
class Route:
    """The (row, slot) pairs, sorted by expert."""

    metadata: Any
    row: Tensor  # [N * k] int32, of each pair
    pair: Tensor  # [N * k] int32, row * k + slot
    share: Tensor  # [N * k] fp32


class TritonKernels:
    """One layer's experts, and calls of them. A graph can capture a whole call, because no step
    waits for the CPU."""

    def __init__(self, weights: Weights) -> None:
        self.kernels = library()
        E, _, I = weights.sizes
        where = weights.down.device
        # Rows in the order gate 0, up 0, gate 1, ...
        order = torch.arange(2 * I, device=where).view(2, I).T.flatten()
        self.gate_up = self._packed(*(t.index_select(1, order) for t in weights.tensors[:2]))
        self.down = self._packed(weights.down, weights.down_scale)
        silu_up = self.kernels.specialize.FnSpecs("silu_up", _silu_up, (), reduction_n=2)
        self.activation = self.kernels.matmul.FusedActivation(silu_up, ())
        self.E = E

    def _packed(self, codes: Tensor, scale: Tensor) -> tuple[Any, Any]:
        """codes [E, N, K/2] and scale [E, N, K/32] in the library's layout for this GPU, as [E, K,
        N]."""
        tensor, layout = self.kernels.tensor, self.kernels.tensor_details.layout
        value = tensor.wrap_torch_tensor(codes.mT, dtype=tensor.FP4)
        powers = tensor.wrap_torch_tensor(scale.mT)
        of_value = layout.make_default_matmul_mxfp4_w_layout(mx_axis=-2)
        of_scale = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=-2, num_warps=WARPS)
        packed_scale = tensor.convert_layout(powers, of_scale)
        config = self.kernels.matmul.PrecisionConfig(
            b_mx_scale=packed_scale, b_microblock_size=mxfp4.GROUP
        )
        return tensor.convert_layout(value, of_value), config

    def route(self, case: Case) -> Route:
        N, k = case.experts.shape
        chosen = case.experts.flatten()
        _, pairs = chosen.sort(stable=True)
        sizes = torch.zeros(self.E, dtype=torch.int32, device=chosen.device)
        sizes.scatter_add_(0, chosen.long(), torch.ones_like(chosen))
        metadata = self.kernels.tensor.make_ragged_tensor_metadata(sizes, N * k)
        pair = pairs.int()
        return Route(metadata, pair // k, pair, case.shares.flatten()[pairs])

    def matrices(self, case: Case, route: Route) -> Tensor:
        """The experts' output, [N, D], in three launches: two matrix products and torch's sum."""
        matmul, (N, k) = self.kernels.matmul.matmul, case.experts.shape
        gate_up, first = self.gate_up
        down, second = self.down
        hidden = matmul(
            case.x, gate_up, None, a_ragged_metadata=route.metadata, gather_indx=route.row,
            precision_config=first, fused_activation=self.activation,
        )  # fmt: skip
        by_pair = matmul(
            hidden, down, None, a_ragged_metadata=route.metadata, scatter_indx=route.pair,
            precision_config=second, gammas=route.share,
        )  # fmt: skip
        return by_pair.view(N, k, -1).sum(1)

    def from_ids(self, case: Case) -> Call:
        return lambda: self.matrices(case, self.route(case))

    def matrices_alone(self, case: Case) -> Call:
        route = self.route(case)
        return lambda: self.matrices(case, route)


class Plain:
    """Plain torch on bf16 weights. It gathers the chosen experts and multiplies them as a batch."""

    def __init__(self, weights: Weights) -> None:
        self.gate_up = self._decoded(weights.gate_up, weights.gate_up_scale)
        self.down = self._decoded(weights.down, weights.down_scale)

    @staticmethod
    def _decoded(codes: Tensor, scale: Tensor) -> Tensor:
        E, rows, half = codes.shape
        decoded = torch.empty(E, rows, half * 2, dtype=torch.bfloat16, device=codes.device)
        for e in range(E):
            decoded[e] = mxfp4.dequantize(codes[e], scale[e])
        return decoded

    def from_ids(self, case: Case) -> Call:
        return lambda: self(case)

    def __call__(self, case: Case) -> Tensor:
        N, k = case.experts.shape
        chosen = case.experts.flatten()
        columns = case.x[:, None].expand(N, k, -1).reshape(N * k, -1, 1)
        gate, up = torch.bmm(self.gate_up.index_select(0, chosen), columns).chunk(2, 1)
        hidden = torch.nn.functional.silu(gate) * up  # [N k, I, 1]
        by_pair = torch.bmm(self.down.index_select(0, chosen), hidden).view(N, k, -1)
        return (by_pair * case.shares.bfloat16()[..., None]).sum(1)
