"""The state of a sequence on the fast path: buffers of fixed size, with the length on the device.

Every buffer is addressed by absolute position. So a rejected draft is taken back by a smaller length
alone: what lies beyond the length is written again before it is read. A state takes over the reference's
`Cache`, and gives it back, bit for bit.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fast.target import GRID, MAX_ROWS
from qwen35.cache import E4M3, Cache, DeltaState, FP8KVCache, KVCache
from qwen35.config import Config
from qwen35.errors import InputError

# Positions of which a delta net's projections are kept: a pass's rows, and those that its convolution
# reads before them.
RING = 16
Rope = tuple[Tensor, Tensor]  # cosine and sine, as `rope_table` gives them


@dataclass
class Keys:
    """Keys (after norm and RoPE) and values of an attention layer, [G, capacity, K] each, bf16 or e4m3.

    key_scales, value_scales: [G, capacity, 1] uint8 as in `qwen35.cache.FP8KVCache`; empty tensors if
    keys and values are bf16.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor

    @classmethod
    def empty(
        cls, config: Config, capacity: int, device: torch.device, kv_cache_dtype: str = "auto"
    ) -> "Keys":
        """Room for `capacity` positions. kv_cache_dtype: one of `qwen35.cache.KV_CACHE_DTYPES`."""
        kind = FP8KVCache if kv_cache_dtype == "fp8" else KVCache
        cache = kind.empty((1, config.num_key_value_heads, config.head_dim), torch.bfloat16, device)
        cache.reserve(capacity)
        return cls.over(cache)

    @classmethod
    def over(cls, cache: KVCache) -> "Keys":
        """The memory of a reference's cache itself, with all its room; it holds one sequence."""
        k, v = cache.k[0], cache.v[0]
        if isinstance(cache, FP8KVCache):
            return cls(k, v, cache.k_scale[0], cache.v_scale[0])
        none = torch.empty(0, dtype=torch.uint8, device=k.device)
        return cls(k, v, none, none)

    def take(self, cache: KVCache, length: int) -> None:
        """Copy the first `length` positions of the reference's cache, if they are not in this memory."""
        if self.is_memory_of(cache):
            return
        for held, given in zip(self._held(), cache.buffers().values(), strict=True):
            held[:, :length] = given[0, :, :length]

    def give(self, cache: KVCache, length: int) -> None:
        """Replace the content of the reference's cache by the first `length` positions."""
        cache.length = 0
        cache.take(*(held[None, :, :length] for held in self._held()))

    def is_memory_of(self, cache: DeltaState | KVCache) -> bool:
        """Whether a cache of the reference lies in this memory."""
        return isinstance(cache, KVCache) and cache.k.data_ptr() == self.keys.data_ptr()

    def cache(self) -> KVCache:
        """A cache of the reference in this memory, without positions."""
        if self.keys.dtype == E4M3:
            return FP8KVCache(*(held[None] for held in self._held()))
        return KVCache(self.keys[None], self.values[None])

    def take_over(self, other: "Keys") -> None:
        """Copy the content of another, which may have less room."""
        for held, given in zip(self._held(), other._held(), strict=True):
            held[:, : given.shape[1]] = given

    def _held(self) -> list[Tensor]:
        """All buffers, in the order of `KVCache.buffers`."""
        scales = [self.key_scales, self.value_scales] if self.keys.dtype == E4M3 else []
        return [self.keys, self.values, *scales]


@dataclass
class Delta:
    """State of a delta-net layer.

    projected: [RING, M] bf16, rows of the in-projection; q, k and v are the first of the M columns. The
    row of position p lies at p modulo RING. states: [slots, HV, K, V] fp32; the memory after position p
    lies at p modulo slots.
    """

    projected: Tensor
    states: Tensor

    @classmethod
    def empty(cls, config: Config, slots: int, device: torch.device) -> "Delta":
        heads = config.linear_num_value_heads
        columns = config.conv_dim + heads * (config.linear_value_head_dim + 2)
        sizes = (config.linear_key_head_dim, config.linear_value_head_dim)
        return cls(
            torch.zeros(RING, columns, dtype=torch.bfloat16, device=device),
            torch.zeros(slots, heads, *sizes, dtype=torch.float32, device=device),
        )

    def take(self, state: DeltaState, length: int) -> None:
        """Copy the reference's state after `length` tokens, if it is not in this memory."""
        if (
            isinstance(state, HeldDelta)
            and state.recurrent.data_ptr() == self.states[-1].data_ptr()
        ):
            return
        taps, columns = state.conv.shape[1:]
        for place, row in zip(self._places(length, taps), state.conv[0], strict=True):
            self.projected[place, :columns] = row
        self.states[(length - 1) % len(self.states)] = state.recurrent[0]

    def give(self, state: DeltaState, length: int) -> None:
        """Replace the reference's state by the state after `length` tokens."""
        taps, columns = state.conv.shape[1:]
        rows = [self.projected[place, :columns] for place in self._places(length, taps)]
        conv = torch.stack(rows)
        state.take(conv[None], self.states[None, (length - 1) % len(self.states)])

    def cache(self, taps: int, columns: int) -> "HeldDelta":
        """A state of the reference in this memory, before the first token. taps: the rows before a token
        that its convolution reads, of which `columns` are kept."""
        held = HeldDelta(self.projected[None, RING - taps :, :columns], self.states[-1:])
        held.conv.zero_()
        held.recurrent.zero_()
        return held

    def take_over(self, other: "Delta") -> None:
        """Copy the content of another of the same size."""
        self.projected.copy_(other.projected)
        self.states.copy_(other.states)

    def _places(self, length: int, taps: int) -> list[int]:
        """The places in the ring of the `taps` rows before position `length`. Rows before position 0 are
        read as zeros. (A tensor indexed by this list would wait for the GPU.)"""
        return [(length - taps + i) % RING for i in range(taps)]


@dataclass(repr=False)
class HeldDelta(DeltaState):
    """A state of the reference in the memory of a `Delta`, as it is after a multiple of GRID tokens: then
    the rows for the convolution, and the memory, lie at the end of their buffers."""

    def __post_init__(self) -> None:
        assert GRID % RING == 0 == GRID % MAX_ROWS

    def take(self, conv: Tensor, recurrent: Tensor) -> None:
        self.conv.copy_(conv)
        self.recurrent.copy_(recurrent)

    def tensors(self) -> dict[str, Tensor]:
        """Copies, since the next pass overwrites the state itself."""
        return {name: tensor.clone() for name, tensor in super().tensors().items()}


@dataclass
class State:
    """All state of one sequence.

    layers: one entry for each layer of the trunk; mtp: the MTP head's keys and values, None without
    drafts. cosine, sine: RoPE's table, [capacity, rotary / 2] fp32. starts: [1 + drafts] int32 on the
    device, the positions at which a round's passes begin: the trunk's, then one for each pass of the MTP
    head.
    """

    layers: list[Keys | Delta]
    mtp: Keys | None
    cosine: Tensor
    sine: Tensor
    starts: Tensor

    @classmethod
    def empty(
        cls,
        config: Config,
        capacity: int,
        drafts: int,
        device: torch.device,
        kv_cache_dtype: str = "auto",
    ) -> "State":
        """Room for `capacity` positions and rounds of `drafts` drafts.

        kv_cache_dtype: one of `qwen35.cache.KV_CACHE_DTYPES`. InputError when a pass's rows and the
        convolution's do not fit into the ring.
        """
        if MAX_ROWS + config.linear_conv_kernel_dim - 1 > RING:
            raise InputError(
                f"{config.linear_conv_kernel_dim} taps; the fast path keeps {RING} positions of a delta "
                f"net's projections, {MAX_ROWS} of them for a pass"
            )
        layers = [
            Keys.empty(config, capacity, device, kv_cache_dtype)
            if kind == "full_attention"
            else Delta.empty(config, MAX_ROWS, device)
            for kind in config.layer_types
        ]
        mtp = Keys.empty(config, capacity, device, kv_cache_dtype) if drafts else None
        cosine, sine = rope_table(config.rotary_dim, config.rope_theta, capacity, device)
        return cls(
            layers, mtp, cosine, sine, torch.zeros(1 + drafts, dtype=torch.int32, device=device)
        )

    @property
    def capacity(self) -> int:
        """The number of positions that there is room for."""
        return len(self.cosine)

    def take(self, cache: Cache) -> None:
        """Copy the reference's cache of a whole prompt. InputError when there is no room for it."""
        length = cache.length
        if length > self.capacity:
            raise InputError(f"{length} tokens; the fast path's cache holds {self.capacity}")
        for state, given in zip(self.layers, cache.layers, strict=True):
            state.take(given, length)  # pyright: ignore (of the same kind)
        if self.mtp is not None and cache.mtp is not None:
            self.mtp.take(cache.mtp, cache.mtp.length)
        self.place(length)

    def cache(self, config: Config) -> Cache:
        """Return an empty cache of the reference in this state's own memory, for the whole blocks of a
        prompt. `take` leaves its content where it is."""
        taps = config.linear_conv_kernel_dim - 1
        layers: list[DeltaState | KVCache] = [
            own.cache(taps, config.conv_dim) if isinstance(own, Delta) else own.cache()
            for own in self.layers
        ]
        return Cache(layers, None if self.mtp is None else self.mtp.cache())

    def place(self, length: int) -> None:
        """Let the next round begin after `length` tokens."""
        # The MTP head's first pass takes the newest token together with the hidden state of the token
        # before it, and so begins at that token's position.
        starts = [length, length - 1, *range(length, length + len(self.starts))]
        self.starts.copy_(torch.tensor(starts[: len(self.starts)], dtype=torch.int32))

    def take_over(self, other: "State") -> None:
        """Copy another state, which may have less room."""
        for own, given in zip(self.layers, other.layers, strict=True):
            own.take_over(given)  # pyright: ignore (of the same kind)
        if self.mtp is not None and other.mtp is not None:
            self.mtp.take_over(other.mtp)
        self.starts.copy_(other.starts)

    def give(self, cache: Cache) -> None:
        """Replace the content of a cache of the reference by this state."""
        length = int(self.starts[0])
        for state, given in zip(self.layers, cache.layers, strict=True):
            state.give(given, length)  # pyright: ignore (of the same kind)
        if self.mtp is not None and cache.mtp is not None:
            self.mtp.give(cache.mtp, int(self.starts[1]))
        cache.length = length


@lru_cache(maxsize=2)  # the attention layers of a model have the same one
def rope_table(rotary_dim: int, theta: float, count: int, device: torch.device) -> Rope:
    """Cosine and sine of `count` positions and every pair of channels, [count, rotary_dim / 2] fp32
    each.

    The angles are rounded to float32, as in the reference; cosine and sine are not rounded to bf16.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / theta ** (exponents / rotary_dim)
    positions = torch.arange(count, device=device)
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()
