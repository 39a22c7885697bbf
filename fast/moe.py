"""Feed-forward: the mixture of experts over MXFP4 or bf16 weights, and the dense MLP."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fast import configs, moe_hip
from fast.launch import Launch, Scratch, constants, options, run
from fast.linear import Norm, Stream, in_bf16, interleaved, product, read_normed, written
from fast.prefill import moe as prefill
from fast.prefill.span import number_of_rows
from fast.router import Router
from fast.target import MAX_ROWS, ROWS, check_kernel, check_rows, check_width, target_of
from qwen35.errors import InputError
from weights import fp8, mxfp4, words
from weights.entry import decode

MAX_PAIRS = 128  # the most rows times top-k: a program searches them all for its expert
MAX_SCALE = {"gfx950": 254, "sm_90": 128}  # the largest e8m0 code that the target's decoding takes


class Experts(nn.Module):
    """x [N, D] bf16, experts [N, k] integers, weights [N, k] -> [N, D] bf16.

    MXFP4 weights: gate_up [E, 2 I, D/2] uint8 (gate row 0, up row 0, gate row 1, ...) with scales
    [E, 2 I, D/32]; down [E, D, I/2] with scales [E, D, I/32]. I is rounded up to a multiple of 128 and
    padded with zeros. gfx950 reads codes in the checkpoint's own order. For sm_90 they are encoded as in
    `weights/words.py`, and gate_up and its scales are stored in its tiles.
    bf16 weights: gate_up [E, 2 I, D] and down [E, D, I], without scales.

    Sums are fp32; a row's bits do not depend on other rows. Up to 8 rows take two launches of Triton
    kernels, or, with kernel="hip", one of a HIP kernel (moe_hip.py: gfx950 and MXFP4 alone). More rows
    are sorted by expert (prefill/moe.py). InputError for sizes that the kernels do not take.
    """

    def __init__(
        self,
        E: int,
        D: int,
        I: int,
        target: str,
        device: torch.device,
        *,
        fp4: bool = True,
        kernel: str = "triton",
    ) -> None:
        super().__init__()
        check_kernel("experts", kernel)
        if target not in ROWS:
            raise InputError(f"target {target!r}; expected {' or '.join(ROWS)}")
        self.stored_I = I  # the checkpoint's; self.I is padded
        I = -(-I // words.SPAN) * words.SPAN if fp4 else I
        multiple = words.SPAN if fp4 else 16
        if D % multiple or I % multiple:
            raise InputError(
                f"experts of hidden size {D} and intermediate size {I}; "
                f"both must be multiples of {multiple}"
            )
        self.E, self.D, self.I, self.target, self.fp4, self.kernel = E, D, I, target, fp4, kernel
        self.workgroups = moe_hip.workgroups_of(device)
        if kernel == "hip":
            moe_hip.check(self)
        self.tile_n = words.TILE_N if target == "sm_90" else 1
        self.tile_k = math.gcd(words.TILE_K, D)
        shape = configs.key(D=D, I=I)
        first, second = (configs.lookup(target, name, shape) for name in ("gate_up", "down"))
        self.gate_up_config = configs.fitted(first, 2 * I, D, fp4=fp4)
        self.down_config = configs.fitted(second, D, I, fp4=fp4)
        if fp4 and self.tile_n > 1 and self.gate_up_config["BLOCK_K"] % self.tile_k:
            raise InputError(
                f"gate_up {shape} for {target}: BLOCK_K = {self.gate_up_config['BLOCK_K']}; expected a "
                f"multiple of {self.tile_k}, the columns of a weight tile"
            )

        def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> nn.Parameter:
            data = torch.empty(*shape, dtype=dtype, device=device)
            return nn.Parameter(data, requires_grad=False)

        if fp4:
            self.gate_up, self.gate_up_scale = empty(E, 2 * I, D // 2), empty(E, 2 * I, D // 32)
            self.down, self.down_scale = empty(E, D, I // 2), empty(E, D, I // 32)
        else:
            self.gate_up = empty(E, 2 * I, D, dtype=torch.bfloat16)
            self.down = empty(E, D, I, dtype=torch.bfloat16)
            self.gate_up_scale, self.down_scale = self.gate_up, self.down  # not read

    @classmethod
    def from_reference(
        cls, module: Any, target: str | None = None, kernel: str = "triton"
    ) -> "Experts":
        """Replaces a `reference.moe.Experts`. MXFP4 and bf16 weights keep their format; FP8 ones become
        bf16.

        Experts are packed one by one, into memory of their own; the module keeps its weights. target:
        default, that of the weights' device.
        """
        if isinstance(module, Experts):
            return module
        gate = module[0].gate_proj.weight
        where, fp4 = gate.device, gate.dtype == torch.uint8
        D, I = module[0].down_proj.weight.shape[0], gate.shape[0]
        target = target or target_of(where)
        packed = cls(len(module), D, I, target, where, fp4=fp4, kernel=kernel)
        for e, expert in enumerate(module):
            parts = (expert.gate_proj, expert.up_proj, expert.down_proj)
            if fp4:
                packed.put(e, *((part.weight, part.weight_scale) for part in parts))
            else:
                packed.put_bf16(e, *map(_bf16, parts))
        return packed

    @classmethod
    def from_tensors(
        cls,
        gate_up: Tensor,
        gate_up_scale: Tensor,
        down: Tensor,
        down_scale: Tensor,
        target: str | None = None,
        kernel: str = "triton",
    ) -> "Experts":
        """From stacked MXFP4 tensors, all uint8: gate_up [E, 2 I, D/2], all gate rows before the up rows,
        with scales [E, 2 I, D/32]; down [E, D, I/2] with scales [E, D, I/32].

        They are copied. `weights.layout.unpack` makes such tensors from shuffled ones. InputError for
        other shapes and dtypes.
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
        where = gate_up.device
        packed = cls(E, D, I, target or target_of(where), where, kernel=kernel)
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
        """Store one expert's MXFP4 codes and scales, given in the checkpoint's order.

        gate, up: [I, D/2] and [I, D/32] uint8. down: [D, I/2] and [D, I/32] uint8. InputError when a
        scale is NaN or too large.
        """
        for name, (_, scale) in {"gate": gate, "up": up, "down": down}.items():
            largest = int(scale.max())
            if largest > MAX_SCALE[self.target]:
                raise InputError(
                    f"expert {e}, {name}_proj: a scale of {largest}"
                    + (" (NaN)" if largest == mxfp4.NAN_SCALE else "")
                    + f"; {self.target} decodes scales up to {MAX_SCALE[self.target]}"
                )
        # Codes and scales alike: gate row 0, up row 0, gate row 1, and so on.
        more = 2 * (self.I - self.stored_I)
        gate_up, gate_up_scale = (
            F.pad(torch.stack(two, 1).flatten(0, 1), (0, 0, 0, more))
            for two in zip(gate, up, strict=True)
        )
        down_codes, down_scale = (
            F.pad(part, (0, width - part.shape[1]))
            for part, width in zip(down, (self.I // 2, self.I // 32), strict=True)
        )
        if self.target == "sm_90":
            gate_up, down_codes = words.encode(gate_up), words.encode(down_codes)
            gate_up = words.tiles(gate_up, self.tile_k // 2)
            gate_up_scale = words.tiles(gate_up_scale, self.tile_k // 32)
        self.gate_up[e], self.gate_up_scale[e] = gate_up, gate_up_scale
        self.down[e], self.down_scale[e] = down_codes, down_scale

    def put_bf16(self, e: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Store one expert's bf16 weights: gate and up [I, D], down [D, I]."""
        self.gate_up[e] = torch.stack((gate, up), 1).flatten(0, 1)
        self.down[e] = down

    def expert(self, e: int) -> tuple[Tensor, Tensor]:
        """One expert's weights in bf16: gate_up [2 I, D], whose gate and up rows alternate, and down
        [D, I]."""
        if not self.fp4:
            return self.gate_up[e], self.down[e]
        gate_up, gate_up_scale = self.gate_up[e], self.gate_up_scale[e]
        down = self.down[e]
        if self.target == "sm_90":
            gate_up = words.decode(words.rows(gate_up, self.tile_k // 2))
            gate_up_scale = words.rows(gate_up_scale, self.tile_k // 32)
            down = words.decode(down)
        pairs = (gate_up, gate_up_scale), (down, self.down_scale[e])
        first, second = (mxfp4.dequantize(codes, scale) for codes, scale in pairs)
        return first, second

    def launches(
        self,
        x: Tensor | Stream,
        experts: Tensor,
        weights: Tensor,
        scratch: Scratch,
        *,
        shared: tuple[Tensor, Tensor] | None = None,
        residual: Tensor | None = None,
        then: Norm | None = None,
        out: str = "moe",
    ) -> tuple[list[Launch], Any]:
        """The launches of `forward` for up to 8 rows, and the output [N, D] bf16, which they will write.

        experts [N, k] int32, weights [N, k] fp32. shared: what the shared expert needs, the router's
        parts (`Choice.parts`) and its down weight [D, I] bf16. The shared expert and residual [N, D] bf16
        are added to the sum before it is rounded. then, out: as in `fast.linear.product`.
        """
        reads = read_normed(x)
        check_rows("experts", reads["x"], self.D)
        self._check_choice(reads["x"], experts, weights)
        N, k = experts.shape
        if N * k > MAX_PAIRS:
            raise InputError(f"{N} rows of {k} experts; expected at most {MAX_PAIRS} in all")
        if self.kernel == "hip":
            whole, result = moe_hip.launch(
                self, x, experts, weights, scratch,
                workgroups=self.workgroups, shared=shared, residual=residual, then=then, out=out,
            )  # fmt: skip
            return [whole], result
        from fast.kernels import moe as kernels  # Triton is needed from here on

        hidden = scratch("expert hidden", N * k, MAX_ROWS, self.I)
        first_pair = scratch("first pair", N * k, dtype=torch.int32)
        partial = scratch("expert partial", N * k + 1, MAX_ROWS, self.D, dtype=torch.float32)
        shape = configs.key(D=self.D, I=self.I) + ("" if self.fp4 else " bf16")
        overlap = self.target == "sm_90"  # AMD has no programmatic dependent launch
        sizes = {
            "E": self.E, "D": self.D, "I": self.I, "FP4": self.fp4, "ROWS": ROWS[self.target],
            "OVERLAP": overlap,
        }  # fmt: skip
        first, second = self.gate_up_config, self.down_config

        def block_bytes(config: dict[str, int]) -> int:
            numbers = config["BLOCK_N"] * config["BLOCK_K"]
            return numbers // 2 if self.fp4 else 2 * numbers

        blocks = self.D // second["BLOCK_N"]
        writes, result = written(out, N, self.D, blocks, self.target, then, scratch)
        parts, shared_weight = shared or (partial, hidden)
        shared_I = 0 if shared is None else shared_weight.shape[1]
        sizes |= {
            "parts": parts, "shared": scratch("shared hidden", N, shared_I), "rows": N, "pairs": N * k,
            "shared_width": parts.shape[2], "SHARED_I": shared_I,
            "SPLITS": len(parts) if shared_I else 1,
        }  # fmt: skip
        programs = N * k + (shared is not None)
        gate_up = Launch(
            f"gate_up {shape}",
            kernels.gate_up,
            (2 * self.I // first["BLOCK_N"], programs, 1),
            {
                **reads, "experts": experts, "weight": self.gate_up, "scale": self.gate_up_scale,
                "first": first_pair, "hidden": hidden, "TILE_N": self.tile_n, "TILE_K": self.tile_k,
                **sizes, **constants(first),
            },
            options(first),
            block_bytes(first),
        )  # fmt: skip
        down = Launch(
            f"down {shape}",
            kernels.down,
            (blocks, programs, 1),
            {
                "hidden": hidden, "experts": experts, "first": first_pair, "weights": weights,
                "weight": self.down, "scale": self.down_scale, "shared_weight": shared_weight,
                "partial": partial, "arrived": scratch("experts arrived", blocks, dtype=torch.int32),
                "residual": hidden if residual is None else residual, **writes, "TOP_K": k,
                "HAS_RESIDUAL": residual is not None, "BLOCK_I": math.gcd(shared_I, 128) or 16,
                **sizes, **constants(second),
            },
            options(second) | ({"launch_pdl": True} if overlap else {}),
            block_bytes(second),
        )  # fmt: skip
        return [gate_up, down], result

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        if len(x) > MAX_ROWS:
            self._check_choice(x, experts, weights)
        if x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            check_experts(experts, self.E)
        chosen, scratch = (experts.int(), weights.float()), Scratch(x.device)
        if len(x) > MAX_ROWS:
            work, out = prefill.experts(self, x, *chosen, number_of_rows(x), scratch)
        else:
            work, out = self.launches(x, *chosen, scratch)
        run(work, x.device)
        return out

    def _check_choice(self, x: Tensor, experts: Tensor, weights: Tensor) -> None:
        """InputError unless experts and weights are [N, k] for x [N, D] in bf16."""
        check_width("experts", x, self.D)
        if experts.shape[:-1] != x.shape[:1] or weights.shape != experts.shape:
            raise InputError(
                f"experts {list(experts.shape)} and weights {list(weights.shape)} for {len(x)} rows; "
                f"expected [{len(x)}, k] twice"
            )

    def extra_repr(self) -> str:
        kind = ("MXFP4" if self.fp4 else "bf16") + (", HIP" if self.kernel == "hip" else "")
        return f"{self.E} of {self.D} -> {self.stored_I} -> {self.D}, {kind}, {self.target}"


class SparseMoeBlock(nn.Module):
    """Routed experts plus the shared expert behind its sigmoid gate, [B, T, D] -> [B, T, D].

    Up to 8 rows take three launches: the router with the shared expert's gate-up product, and the
    experts' two, or one (`Experts`). The last one also computes the shared expert's down product and adds
    everything up. More rows go through prefill/moe.py.
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
    def from_reference(
        cls, module: Any, target: str | None = None, kernel: str = "triton"
    ) -> "SparseMoeBlock":
        """Replaces a `reference.moe.SparseMoeBlock`; target as in `Experts`. kernel: the router's and the
        experts'."""
        shared, shared_gate = module.shared_expert, module.shared_expert_gate
        return cls(
            Router.from_reference(module.gate, target, shared, shared_gate, kernel),
            Experts.from_reference(module.experts, target, kernel),
            None if shared is None else in_bf16(shared.down_proj),
        )

    def launches(
        self,
        x: Tensor | Stream,
        scratch: Scratch,
        *,
        residual: Tensor | None = None,
        then: Norm | None = None,
        out: str = "moe",
    ) -> tuple[list[Launch], Any]:
        """The launches of `forward`, and the output [N, D] bf16, which they will write. x: [N, D] bf16; a
        stream is normalised first. residual, then, out: as in `fast.linear.product`."""
        route, choice = self.gate.launch(x, scratch)
        shared = None
        if self.shared_down is not None:
            shared = choice.parts, self.shared_down
        routed, result = self.experts.launches(
            x, choice.experts, choice.weights, scratch,
            shared=shared, residual=residual, then=then, out=out,
        )  # fmt: skip
        return [route, *routed], result

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        scratch = Scratch(x.device)
        if len(rows) > MAX_ROWS:
            work, out = prefill.block(self, rows, number_of_rows(rows), scratch)
        else:
            work, out = self.launches(rows, scratch)
        run(work, x.device)
        return out.view_as(x)


class MLP(nn.Module):
    """A dense layer's down(silu(gate(x)) * up(x)), [B, T, D] -> [B, T, D], in two launches for up to 8
    rows.

    gate_up [2 I, D] bf16, in which gate and up rows alternate; down [D, I] bf16. More rows go through
    prefill/moe.py.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, target: str) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(gate_up, requires_grad=False)
        self.down = nn.Parameter(down, requires_grad=False)
        self.target = target

    @classmethod
    def from_reference(cls, module: Any, target: str | None = None) -> "MLP":
        """Replaces a `reference.moe.MLP`. target: default, that of the weights' device."""
        target = target or target_of(module.gate_proj.weight.device)
        gate_up = interleaved(module.gate_proj, module.up_proj)
        return cls(gate_up, in_bf16(module.down_proj), target)

    def launches(
        self,
        x: Tensor | Stream,
        scratch: Scratch,
        *,
        residual: Tensor | None = None,
        then: Norm | None = None,
        out: str = "mlp",
    ) -> tuple[list[Launch], Any]:
        """As in `SparseMoeBlock`."""
        check_rows("the MLP", read_normed(x)["x"], self.gate_up.shape[1])
        first, hidden = product(
            x, self.gate_up, self.target, scratch, name="mlp_gate_up", activated=True
        )
        second, result = product(
            hidden, self.down, self.target, scratch,
            name="mlp_down", residual=residual, then=then, out=out,
        )  # fmt: skip
        return [first, second], result

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        scratch = Scratch(x.device)
        if len(rows) > MAX_ROWS:
            work, out = prefill.mlp(self, rows, number_of_rows(rows), scratch)
        else:
            work, out = self.launches(rows, scratch)
        run(work, x.device)
        return out.view_as(x)


def _bf16(linear: Any) -> Tensor:
    """A layer's weight [N, K] in bf16: as it is, or decoded from FP8."""
    if linear.weight.dtype == fp8.E4M3:
        weight, scale = linear.weight, linear.weight_scale
        return decode("fp8", weight, scale, torch.bfloat16, linear.stored_as, linear.block)
    return in_bf16(linear)


def check_experts(experts: Tensor, E: int) -> None:
    """InputError when one of the ids is not an expert's, from 0 to E - 1."""
    outside = experts[(experts < 0) | (experts >= E)].tolist()
    if outside:
        raise InputError(f"expert {outside[0]}; there are {E}, from 0 to {E - 1}")
