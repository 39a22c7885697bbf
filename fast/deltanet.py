"""The gated delta net for 1 to 8 rows, in three launches."""

from typing import Any

import torch
from torch import Tensor, nn

from fast import configs
from fast.launch import Launch, Scratch, constants, options, run
from fast.linear import Norm, Stream, in_bf16, product, read_normed, stacked
from fast.prefill import deltanet as prefill
from fast.prefill.layer import prefilled
from fast.state import RING, Delta
from fast.target import MAX_ROWS, check_rows, target_of
from qwen35.cache import DeltaState
from qwen35.errors import InputError


class GatedDeltaNet(nn.Module):
    """x: [B, T, D], the tokens after those that `state` has seen -> [B, T, D]; updates `state`.

    in_proj [M, D] bf16: rows of q, k, v, z, b and a; the reference's four matrices are views of it. A
    pass of up to 8 rows is three launches: the in-projection; convolution, gates, delta rule and gated
    norm; the out-projection. More rows are computed 64 at a time (prefill/deltanet.py). Several sequences
    go through `many`, the reference's node over the same weights. InputError when a head size is not a
    power of two.
    """

    def __init__(self, module: Any, target: str) -> None:
        super().__init__()
        self.in_proj = stacked(
            module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a
        )
        self.out_proj = in_bf16(module.out_proj)
        self.taps = nn.Parameter(in_bf16(module.conv1d)[:, 0].contiguous(), requires_grad=False)
        self.decay_log = _float32(module.A_log)
        self.decay_bias = _float32(module.dt_bias)
        self.norm = _float32(module.norm.weight)
        self.eps, self.sigmoid = module.norm.eps, module.norm.gate_type == "sigmoid"
        self.H, self.HV = module.num_k_heads, module.num_v_heads
        self.K, self.V = module.head_k_dim, module.head_v_dim
        self.target, self.many = target, module
        for name, size in (("key", self.K), ("value", self.V)):
            if size & (size - 1):
                raise InputError(f"a delta net of {name} head size {size}; expected a power of two")

    @classmethod
    def from_reference(cls, module: Any, target: str | None = None) -> "GatedDeltaNet":
        """Replaces a `reference.deltanet.GatedDeltaNet`. target: default, that of the weights' device."""
        return cls(module, target or target_of(module.out_proj.weight.device))

    def launches(
        self,
        x: Tensor | Stream,
        state: Delta,
        start: Tensor,
        scratch: Scratch,
        *,
        residual: Tensor | None = None,
        then: Norm | None = None,
        out: str = "mixed",
    ) -> tuple[list[Launch], Any]:
        """The launches of a pass, and its output [N, D] bf16, which they will write.

        x: [N, D] bf16, the rows of positions start[0] and later; a `Stream` is normalised first. start
        [1] int32, on the device. residual, then, out: as in `fast.linear.product`.
        """
        from fast.kernels import deltanet as kernels  # Triton is needed from here on

        rows = read_normed(x)["x"]
        check_rows("the delta net", rows, self.in_proj.shape[1])
        N = len(rows)
        first, projected = product(
            x, self.in_proj, self.target, scratch,
            name="delta_in", ring=(state.projected, start),
        )  # fmt: skip
        config = configs.lookup(self.target, "delta", configs.key(HV=self.HV, K=self.K, V=self.V))
        config = config | {"BLOCK_V": min(config["BLOCK_V"], self.V)}
        blocks = self.V // config["BLOCK_V"]
        read = scratch("delta read", N, self.HV * self.V)
        rule = Launch(
            f"delta {configs.key(H=self.H, HV=self.HV, K=self.K, V=self.V)}",
            kernels.delta,
            (self.HV, blocks, 1),
            {
                "projected": projected, "taps": self.taps, "decay_log": self.decay_log,
                "decay_bias": self.decay_bias, "norm": self.norm, "states": state.states,
                "gated": scratch("delta gated", *read.shape, dtype=torch.float32),
                "squares": scratch("delta squares", self.HV, blocks, MAX_ROWS, dtype=torch.float32),
                "arrived": scratch("delta arrived", self.HV, dtype=torch.int32), "out": read,
                "start": start, "rows": N, "slots": len(state.states),
                "M": projected.shape[1], "eps": self.eps,
                "H": self.H, "HV": self.HV, "K": self.K, "V": self.V, "TAPS": self.taps.shape[1],
                "RING": RING, "SIGMOID": self.sigmoid,
                **constants(config),
            },
            options(config),
        )  # fmt: skip
        last, result = product(
            read, self.out_proj, self.target, scratch,
            name="delta_out", residual=residual, then=then, out=out,
        )  # fmt: skip
        return [first, rule, last], result

    def forward(self, x: Tensor, state: DeltaState) -> Tensor:
        B, T, _ = x.shape
        if B > 1:
            return self.many(x, state)
        if T > MAX_ROWS:
            return prefilled(prefill.work, self, x, state)
        own, start, _ = self.begin(x, state)
        launches, out = self.launches(x[0], own, start, Scratch(x.device))
        run(launches, x.device)
        self.end(own, state, T)
        return out[None]

    def begin(self, x: Tensor, state: DeltaState) -> tuple[Delta, Tensor, None]:
        """The reference's state in this node's buffers, and the position at which a pass then begins."""
        taps = state.conv.shape[1]
        own = Delta(
            x.new_zeros(RING, len(self.in_proj)),
            state.recurrent.new_zeros(MAX_ROWS, *state.recurrent.shape[1:]),
        )
        # The rule depends on no absolute position; at position `taps`, all rows that it reads exist.
        own.take(state, taps)
        return own, torch.full((1,), taps, dtype=torch.int32, device=x.device), None

    def end(self, own: Delta, state: DeltaState, T: int) -> None:
        """Advance the reference's state by a pass of T rows, which began where `begin` said."""
        taps, columns = state.conv.shape[1:]
        rows = torch.cat((state.conv[0], own.projected[taps : taps + T, :columns]))
        state.advance(rows[None], [own.states[None, (taps + t) % MAX_ROWS] for t in range(T)])

    def extra_repr(self) -> str:
        return f"{self.H} key heads of {self.K}, {self.HV} value heads of {self.V}, {self.target}"


def _float32(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float(), requires_grad=False)
