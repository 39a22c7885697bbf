"""The state of a sequence between passes: plain dataclasses of tensors, with one entry per layer.

`Cache` has the whole state. A forward reads and writes it; nothing else holds state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from qwen35.config import Config

KV_CACHE_DTYPES = ("auto", "fp8")  # the model's dtype, or e4m3 with scales


@dataclass(repr=False)
class KVCache:
    """Keys (after norm and RoPE) and values of one full-attention layer.

    k, v: [B, G, capacity, K]. Positions from `length` on are undefined.
    """

    k: Tensor
    v: Tensor
    length: int = field(default=0, kw_only=True)

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str
    ) -> Self:
        """A cache without positions. shape: B, G and K."""
        B, G, K = shape
        return cls(*(torch.empty(B, G, 0, K, dtype=dtype, device=device) for _ in range(2)))

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, G, T, K]. Returns all keys and values, [B, G, P, K] each (views)."""
        self.take(*self.rounded(k, v))
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def rounded(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """What this cache holds of k, v [B, G, T, K]: rows of every tensor, as `take` wants them."""
        return k, v

    def take(self, *rows: Tensor) -> None:
        """Append T positions of every tensor, in the order of `tensors`. They may be on any
        device."""
        self.take_all([rows])

    def take_all(self, parts: Sequence[Sequence[Tensor]]) -> None:
        """`take` several times, with one copy for each tensor."""
        end = self.length + sum(rows[0].shape[2] for rows in parts)
        self.grow(end)
        for buffer, new in zip(self.buffers().values(), zip(*parts, strict=True), strict=True):
            target = buffer[:, :, self.length : end]
            if len(new) == 1:
                target[:] = new[0]
                continue
            here = [rows.to(target.device) for rows in new]
            # As bytes, since not every build of torch joins e4m3.
            if target.dtype.itemsize == 1:
                target, here = target.view(torch.uint8), [rows.view(torch.uint8) for rows in here]
            torch.cat(here, dim=2, out=target)
        self.length = end

    @property
    def capacity(self) -> int:
        """The number of positions in the buffers."""
        return self.k.shape[2]

    def grow(self, length: int) -> None:
        """Make room for a sequence of that length. The capacity at least doubles if it is too
        small, so that the total cost of copies is linear in the length."""
        if length > self.capacity:
            self.reserve(max(length, 2 * self.capacity))

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions in total. The stored positions stay."""
        if capacity <= self.capacity:
            return
        for name, held in self.buffers().items():
            B, G, _, K = held.shape
            grown = held.new_empty(B, G, capacity, K)
            grown[:, :, : self.length] = held[:, :, : self.length]
            setattr(self, name, grown)

    def rollback(self, tokens: int) -> None:
        """Remove the last `tokens` positions."""
        self.length -= tokens

    def buffers(self) -> dict[str, Tensor]:
        """The whole buffers by name, [B, G, capacity, ...] each."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def __repr__(self) -> str:
        return described(self, f"length {self.length} of {self.capacity}")

    @property
    def names(self) -> list[str]:
        """The names of `tensors`."""
        return list(self.buffers())

    def tensors(self) -> dict[str, Tensor]:
        """The stored positions by name, [B, G, length, ...] each (views)."""
        return {name: buffer[:, :, : self.length] for name, buffer in self.buffers().items()}

    def copy(self, like: Self | None = None) -> Self:
        """A copy with new buffers, in the dtypes of `like` (default: its own)."""
        dtypes = [buffer.dtype for buffer in (like or self).buffers().values()]
        held = zip(self.tensors().values(), dtypes, strict=True)
        return type(self)(*(t.to(dtype, copy=True) for t, dtype in held), length=self.length)


@dataclass(repr=False)
class FP8KVCache(KVCache):
    """Keys and values in e4m3, with one scale per position and head. It takes half the bytes of
    bfloat16.

    k, v: [B, G, capacity, K] float8_e4m3fn. k_scale, v_scale: [B, G, capacity, 1] uint8, exponents
    s as in e8m0: a number is its e4m3 value times 2^(s - 127).

    Attention reads the rounded numbers also for the tokens of the same pass. Therefore neither the
    chunks of a prompt nor a hit of the prefix cache change the bits.
    """

    k_scale: Tensor
    v_scale: Tensor

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str
    ) -> Self:
        """A cache without positions. shape: B, G and K. dtype: the model's, which is not used."""
        B, G, K = shape
        numbers = [torch.empty(B, G, 0, K, dtype=E4M3, device=device) for _ in range(2)]
        scales = [torch.empty(B, G, 0, 1, dtype=torch.uint8, device=device) for _ in range(2)]
        return cls(*numbers, *scales)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Round and append k, v [B, G, T, K]. Returns all keys and values, [B, G, P, K] each, in
        k's dtype."""
        self.take(*self.rounded(k, v))
        held = self.tensors()
        return (
            from_e4m3(held["k"], held["k_scale"], k.dtype),
            from_e4m3(held["v"], held["v_scale"], v.dtype),
        )

    def rounded(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """k, v [B, G, T, K] in e4m3, then their scales [B, G, T, 1]."""
        (k8, k_scale), (v8, v_scale) = to_e4m3(k), to_e4m3(v)
        return k8, v8, k_scale, v_scale


E4M3 = torch.float8_e4m3fn  # largest number 448 = 1.75 * 2^8


def to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] as e4m3 [..., K] and exponents [..., 1] uint8.

    The scale is the smallest power of two with which all numbers are in the range of e4m3. Powers
    of two cause no rounding error. NaN and infinity give NaN.
    """
    bits = x.abs().amax(-1, keepdim=True).float().view(torch.int32)
    exponent = (bits >> 23) - 8 + (bits & 0x7FFFFF > 0x600000).int()  # 1.75 is 1 + 0x600000 / 2^23
    scale = exponent.clamp(1, 253)
    return (x.float() * from_e8m0(254 - scale)).to(E4M3), scale.to(torch.uint8)


def from_e4m3(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers [..., K] of the result of `to_e4m3`, in dtype. bfloat16 represents all of them
    exactly."""
    return (x.float() * from_e8m0(scale.int())).to(dtype)


def from_e8m0(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) in float32. exponent: int32, 1 to 254."""
    return (exponent << 23).view(torch.float32)


@dataclass(repr=False)
class DeltaState:
    """State of one gated-delta-net layer after the tokens seen so far.

    conv: [B, taps - 1, C], the last raw (pre-convolution) qkv rows, in the model's dtype.
    recurrent: [B, HV, K, V], the matrix memory, float32 (float64 in a float64 model).
    rows: after a decode pass of T tokens, its raw rows and the taps - 1 rows before it,
        [B, taps - 1 + T, C]. Otherwise None.
    trail: after a decode pass, the recurrent states before it and after each of its tokens.

    With `rows` and `trail`, rejected drafts can be taken back.
    """

    conv: Tensor
    recurrent: Tensor
    rows: Tensor | None = None
    trail: list[Tensor] = field(default_factory=list)

    def advance(self, rows: Tensor, states: list[Tensor]) -> None:
        """Advance by a pass. rows: its raw rows, with those before it, as in the class. states: the
        recurrent state after each token (decode), or only the last one."""
        kept = self.conv.shape[1]
        T = rows.shape[1] - kept
        by_token = len(states) == T
        self.rows, self.trail = (rows, [self.recurrent, *states]) if by_token else (None, [])
        self.conv, self.recurrent = rows[:, T:].clone(), states[-1]

    def rollback(self, tokens: int) -> None:
        """Remove the last `tokens` tokens of the last pass, which has to be a decode pass."""
        if tokens == 0:
            return
        assert self.rows is not None and tokens < len(self.trail), "only a decode pass goes back"
        self.rows, self.trail = self.rows[:, :-tokens], self.trail[:-tokens]
        self.conv = self.rows[:, self.rows.shape[1] - self.conv.shape[1] :]
        self.recurrent = self.trail[-1]

    def take(self, conv: Tensor, recurrent: Tensor) -> None:
        """Replace the state by copies of conv and recurrent, which may be on any device."""
        device = self.conv.device
        self.conv, self.recurrent = (t.to(device, copy=True) for t in (conv, recurrent))
        self.rows, self.trail = None, []

    def __repr__(self) -> str:
        more = [f"goes back {len(self.trail) - 1} tokens"] if self.trail else []
        return described(self, *more)

    @property
    def names(self) -> list[str]:
        """The names of `tensors`."""
        return ["conv", "recurrent"]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the next pass starts from, by name."""
        return {"conv": self.conv, "recurrent": self.recurrent}

    def copy(self, like: Self | None = None) -> Self:
        """A copy in the dtypes of `like` (default: its own). It cannot be rolled back."""
        kind = like or self
        conv = self.conv.to(kind.conv.dtype, copy=True)
        return type(self)(conv, self.recurrent.to(kind.recurrent.dtype, copy=True))


State = KVCache | DeltaState


def described(state: State, *more: str) -> str:
    """A line for a debugger: `DeltaState(conv [1, 3, 1024] bfloat16, recurrent ... |max| 3.1)`."""
    parts = []
    for name, tensor in state.tensors().items():
        kind = str(tensor.dtype).removeprefix("torch.")
        has_values = tensor.numel() and not tensor.is_meta
        largest = f" |max| {tensor.float().abs().max():.3g}" if has_values else ""
        parts.append(f"{name} {list(tensor.shape)} {kind}{largest}")
    return f"{type(state).__name__}({', '.join([*parts, *more])})"


@dataclass
class Cache:
    """The whole state of a batch of sequences. length: the number of positions in the trunk."""

    layers: list[State]
    mtp: KVCache | None
    length: int = 0

    @classmethod
    def empty(
        cls,
        config: Config,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        batch: int = 1,
        kv_cache_dtype: str = "auto",
    ) -> "Cache":
        """The state before the first token: no keys, zero states. kv_cache_dtype: one of
        KV_CACHE_DTYPES."""

        def kv() -> KVCache:
            kind = FP8KVCache if kv_cache_dtype == "fp8" else KVCache
            shape = (batch, config.num_key_value_heads, config.head_dim)
            return kind.empty(shape, dtype, device)

        def delta() -> DeltaState:
            heads = config.linear_num_value_heads
            sizes = (config.linear_key_head_dim, config.linear_value_head_dim)
            wide = torch.promote_types(dtype, torch.float32)
            conv = (batch, config.linear_conv_kernel_dim - 1, config.conv_dim)
            return DeltaState(
                torch.zeros(conv, dtype=dtype, device=device),
                torch.zeros(batch, heads, *sizes, dtype=wide, device=device),
            )

        layers = [kv() if kind == "full_attention" else delta() for kind in config.layer_types]
        return cls(layers, kv() if config.mtp_num_hidden_layers else None)

    def advance(self, tokens: int) -> None:
        """Increase `length` after every layer of the trunk has run the tokens."""
        self.length += tokens

    def rollback(self, tokens: int) -> None:
        """Remove the last `tokens` trunk positions (at most those of the last decode pass)."""
        for layer in self.layers:
            layer.rollback(tokens)
        self.length -= tokens

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions in every layer with keys and values."""
        for state in (*self.layers, self.mtp):
            if isinstance(state, KVCache):
                state.reserve(capacity)

    def snapshot(self, first: int = 0, *, mtp: bool = True) -> dict[str, Tensor]:
        """The whole state by node and name, with keys and values only from position `first` on.

        `layers.3.k` and `layers.3.v`: [B, G, length - first, K], with their scales in an FP8 cache.
        `layers.0.conv` and `layers.0.recurrent`: the state after the last token. `mtp.k` and `mtp.v`: the
        MTP head stays one row behind the trunk, so its rows begin at first - 1; they are left out
        unless `mtp` is true. The tensors are views; no later pass of a prefill writes into them.
        """
        held: dict[str, Tensor] = {}
        for node, state in self._nodes(mtp).items():
            before = max(first - 1, 0) if node == "mtp" else first
            for name, tensor in state.tensors().items():
                is_kv = isinstance(state, KVCache)
                held[f"{node}.{name}"] = tensor[:, :, before:] if is_kv else tensor
        return held

    def restore(
        self, parts: Sequence[Mapping[str, Tensor]], length: int, *, mtp: bool = True
    ) -> None:
        """Copy consecutive snapshots into this empty cache. length: the tokens of all of them
        together."""
        for node, state in self._nodes(mtp).items():
            names = [f"{node}.{name}" for name in state.names]
            if isinstance(state, KVCache):
                state.take_all([[part[name] for name in names] for part in parts])
            else:
                state.take(*(parts[-1][name] for name in names))
        self.length = length

    def _nodes(self, mtp: bool) -> dict[str, State]:
        states = {f"layers.{i}": state for i, state in enumerate(self.layers)}
        return states | {"mtp": self.mtp} if mtp and self.mtp is not None else states
