"""The mixture of experts over MXFP4 weights for 1 to 8 rows: `Experts`, `SparseMoeBlock` around it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fast import configs
from fast.launch import Launch, constants, options, run
from fast.router import Router, in_bf16, product
from fast.target import MAX_ROWS, ROWS, check_rows, target_of
from qwen35.errors import InputError
from weights import mxfp4, words

MAX_PAIRS = 128  # rows times top-k that a program looks through
MAX_SCALE = {"gfx950": 254, "sm_90": 128}  # largest e8m0 code that the decoding holds


def _mxfp4(linear: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """A linear layer's codes [N, K/2] and scales [N, K/32], quantised unless it is MXFP4 already."""
    weight = linear.weight.to(device)
    if weight.dtype == torch.uint8:
        return weight, linear.weight_scale.to(device)
    if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
        raise InputError(f"a weight in {weight.dtype}; experts are packed from MXFP4 or from bf16")
    return mxfp4.quantize(weight)


class Experts(nn.Module):
    """x [N, D] bf16, experts [N, k] integers, weights [N, k] -> [N, D] bf16, N from 1 to 8.

    gate_up [E, 2 I, D/2] uint8: gate row 0, up row 0, gate row 1, ... and its scales [E, 2 I, D/32];
    down [E, D, I/2] and [E, D, I/32]. gfx950 takes the checkpoint's own order. For sm_90 codes are
    encoded as `weights/words.py` tells, and gate_up and its scales lie in its tiles. Sums are fp32; a
    row's bits do not depend on other rows.
    """

    def __init__(self, E: int, D: int, I: int, target: str, device: torch.device) -> None:
        super().__init__()
        if target not in ROWS:
            raise InputError(f"target {target!r}; expected {' or '.join(ROWS)}")
        if D % words.SPAN or I % words.SPAN:
            raise InputError(
                f"experts of hidden size {D} and intermediate size {I}; "
                f"both must be multiples of {words.SPAN}"
            )
        self.E, self.D, self.I, self.target = E, D, I, target
        self.tile_n = words.TILE_N if target == "sm_90" else 1
        self.tile_k = math.gcd(words.TILE_K, D)
        shape = configs.key(D=D, I=I)
        self.gate_up_config = configs.fitted(configs.lookup(target, "gate_up", shape), 2 * I, D)
        self.down_config = configs.fitted(configs.lookup(target, "down", shape), D, I)
        blocks = D // self.down_config["BLOCK_N"]

        def empty(*shape: int) -> nn.Parameter:
            data = torch.empty(*shape, dtype=torch.uint8, device=device)
            return nn.Parameter(data, requires_grad=False)

        self.gate_up = empty(E, 2 * I, D // 2)
        self.gate_up_scale = empty(E, 2 * I, D // 32)
        self.down = empty(E, D, I // 2)
        self.down_scale = empty(E, D, I // 32)
        arrived = torch.zeros(blocks, dtype=torch.int32, device=device)
        self.register_buffer("arrived", arrived, persistent=False)

    @classmethod
    def from_reference(cls, module: Any, target: str | None = None) -> "Experts":
        """From `reference.moe.Experts`, whose weights are MXFP4, or floating point and quantised here.

        target: the device's own when not given. Expert by expert; the module keeps its weights.
        """
        gate = module[0].gate_proj.weight
        where = gate.device
        I = gate.shape[0]
        D = module[0].down_proj.weight.shape[0]
        packed = cls(len(module), D, I, target or target_of(where), where)
        for e, expert in enumerate(module):
            parts = (expert.gate_proj, expert.up_proj, expert.down_proj)
            packed.put(e, *(_mxfp4(part, where) for part in parts))
        return packed

    @classmethod
    def from_tensors(
        cls,
        gate_up: Tensor,
        gate_up_scale: Tensor,
        down: Tensor,
        down_scale: Tensor,
        target: str | None = None,
    ) -> "Experts":
        """From stacked MXFP4 tensors: gate_up [E, 2 I, D/2], gate rows first, down [E, D, I/2], uint8.

        Shuffled ones come out of `weights.layout.unpack`, and may stay resident beside these.
        """
        E, I2, half = gate_up.shape
        I, D = I2 // 2, half * 2
        expected = {
            "gate_up_scale": (gate_up_scale, (E, I2, D // 32)),
            "down": (down, (E, D, I // 2)),
            "down_scale": (down_scale, (E, D, I // 32)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor.shape != shape or tensor.dtype != torch.uint8:
                raise InputError(
                    f"{name}: {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} torch.uint8 "
                    f"beside a gate_up of {list(gate_up.shape)}"
                )
        packed = cls(E, D, I, target or target_of(gate_up.device), gate_up.device)
        for e in range(E):
            (gate, up), scales = gate_up[e].chunk(2), gate_up_scale[e].chunk(2)
            packed.put(e, (gate, scales[0]), (up, scales[1]), (down[e], down_scale[e]))
        return packed

    def put(
        self,
        e: int,
        gate: tuple[Tensor, Tensor],
        up: tuple[Tensor, Tensor],
        down: tuple[Tensor, Tensor],
    ) -> None:
        """One expert's codes and scales, in the checkpoint's order."""
        for name, (_, scale) in {"gate": gate, "up": up, "down": down}.items():
            largest = int(scale.max())
            if largest > MAX_SCALE[self.target]:
                raise InputError(
                    f"expert {e}, {name}_proj: a scale of {largest}"
                    + (" (NaN)" if largest == mxfp4.NAN_SCALE else "")
                    + f"; {self.target} decodes scales up to {MAX_SCALE[self.target]}"
                )
        # Gate row 0, up row 0, gate row 1, ...: of codes, and of scales.
        gate_up, gate_up_scale = (
            torch.stack(two, 1).flatten(0, 1) for two in zip(gate, up, strict=True)
        )
        down_codes, down_scale = down
        if self.target == "sm_90":
            gate_up, down_codes = words.encode(gate_up), words.encode(down_codes)
            gate_up = words.tiles(gate_up, self.tile_k // 2)
            gate_up_scale = words.tiles(gate_up_scale, self.tile_k // 32)
        self.gate_up[e], self.gate_up_scale[e] = gate_up, gate_up_scale
        self.down[e], self.down_scale[e] = down_codes, down_scale

    def launches(
        self, x: Tensor, experts: Tensor, weights: Tensor, added: Tensor | None = None
    ) -> tuple[list[Launch], Tensor]:
        """What `forward` launches, and its output [N, D] bf16, not written yet.

        experts [N, k] int32, weights [N, k] fp32; added [N, D] fp32 joins the sum before it is rounded.
        """
        from fast.kernels import moe  # Triton is needed from here on

        check_rows("experts", x, self.D)
        N, k = experts.shape
        if x.shape[0] != N or weights.shape != experts.shape or N * k > MAX_PAIRS:
            raise InputError(
                f"experts {list(experts.shape)} and weights {list(weights.shape)} for x {list(x.shape)}; "
                f"expected [{x.shape[0]}, k] twice, at most {MAX_PAIRS} in all"
            )
        hidden = x.new_empty(N * k, MAX_ROWS, self.I)
        first_pair = torch.empty(N * k, dtype=torch.int32, device=x.device)
        partial = x.new_empty(N * k, MAX_ROWS, self.D, dtype=torch.float32)
        out = torch.empty_like(x)
        shape = configs.key(D=self.D, I=self.I)
        overlap = self.target == "sm_90"  # AMD has no programmatic dependent launch
        sizes = {"D": self.D, "I": self.I, "ROWS": ROWS[self.target], "OVERLAP": overlap}
        first, second = self.gate_up_config, self.down_config
        gate_up = Launch(
            f"gate_up {shape}",
            moe.gate_up,
            (2 * self.I // first["BLOCK_N"], N * k, 1),
            {
                "x": x, "experts": experts, "weight": self.gate_up, "scale": self.gate_up_scale,
                "first": first_pair, "hidden": hidden, "rows": N, "E": self.E,
                "TILE_N": self.tile_n, "TILE_K": self.tile_k, **sizes, **constants(first),
            },
            options(first),
            first["BLOCK_N"] * first["BLOCK_K"] // 2,
        )  # fmt: skip
        down = Launch(
            f"down {shape}",
            moe.down,
            (self.D // second["BLOCK_N"], N * k, 1),
            {
                "hidden": hidden, "experts": experts, "first": first_pair, "weights": weights,
                "weight": self.down, "scale": self.down_scale,
                "partial": partial, "arrived": self.arrived,
                "added": partial if added is None else added, "out": out, "rows": N, "pairs": N * k,
                "E": self.E,
                "TOP_K": k, "HAS_ADDED": added is not None, **sizes, **constants(second),
            },
            options(second) | ({"launch_pdl": True} if overlap else {}),
            second["BLOCK_N"] * second["BLOCK_K"] // 2,
        )  # fmt: skip
        return [gate_up, down], out

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        if x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            check_experts(experts, self.E)
        launches, out = self.launches(x, experts.int(), weights.float())
        run(launches, x.device)
        return out

    def extra_repr(self) -> str:
        return f"{self.E} of {self.D} -> {self.I} -> {self.D}, MXFP4, {self.target}"


class SparseMoeBlock(nn.Module):
    """Routed experts plus the shared one behind its sigmoid gate, [B, T, D] -> [B, T, D], B * T to 8.

    Five launches: router and shared gate-up as one product, the choice, shared down, and the experts'
    two, the last of which adds the shared expert.
    """

    def __init__(self, gate: Router, experts: Experts, shared_down: Tensor | None) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        # [D, I of the shared expert] bf16
        self.shared_down = (
            None if shared_down is None else nn.Parameter(shared_down, requires_grad=False)
        )

    @classmethod
    def from_reference(cls, module: Any, target: str | None = None) -> "SparseMoeBlock":
        """From `reference.moe.SparseMoeBlock`; arguments as of `Experts.from_reference`."""
        shared = module.shared_expert
        return cls(
            Router.from_reference(module.gate, target, shared, module.shared_expert_gate),
            Experts.from_reference(module.experts, target),
            None if shared is None else in_bf16(shared.down_proj),
        )

    def launches(self, x: Tensor) -> tuple[list[Launch], Tensor]:
        """x [N, D] bf16. What `forward` launches, and its output [N, D] bf16, not written yet."""
        check_rows("the MoE block", x, self.experts.D)
        steps, choice = self.gate.launches(x)
        added = None
        if self.shared_down is not None:
            step, parts = product(
                choice.hidden, self.shared_down, self.experts.target, gain=choice.shared_gate
            )
            steps, added = [*steps, step], parts[0]
        routed, out = self.experts.launches(x, choice.experts, choice.weights, added)
        return [*steps, *routed], out

    def forward(self, x: Tensor) -> Tensor:
        launches, out = self.launches(x.flatten(0, 1))
        run(launches, x.device)
        return out.view_as(x)


def check_experts(experts: Tensor, E: int) -> None:
    """InputError when an id is none of E experts."""
    outside = experts[(experts < 0) | (experts >= E)].tolist()
    if outside:
        raise InputError(f"expert {outside[0]}; there are {E}, from 0 to {E - 1}")
