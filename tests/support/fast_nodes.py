"""Compare the fast path's mixers and layers, run in the gfx950 emulator, with the reference.

One pass of a few rows is compared. It begins with the state after some earlier tokens.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fast.attention import GatedAttention
from fast.deltanet import GatedDeltaNet
from fast.launch import Scratch
from fast.layer import DecoderLayer, embedded
from fast.state import RING, Delta, Keys, rope_table
from qwen35.cache import DeltaState, FP8KVCache, KVCache, from_e4m3, to_e4m3
from qwen35.config import Config
from reference.model import Model
from tests.support.family import FAMILY, randomise
from tests.support.fast_cases import CPU, TARGET, counters, emulated, judged, random
from tools.gfx950.emulator import EmulatorError

SIZES = {"linear_key_head_dim": 16, "linear_value_head_dim": 32, "num_hidden_layers": 4}


@cache
def slow_model(name: str, **sizes: Any) -> Model:
    """A small family member in bf16 with random weights. Its head sizes suit the kernels."""
    rope = {"rope_theta": 1e7, "partial_rotary_factor": sizes.pop("rotary", 0.25)}
    model = Model(Config.from_dict(FAMILY[name] | SIZES | {"rope_parameters": rope} | sizes))
    randomise(model, 3)
    return model.bfloat16().eval().requires_grad_(False)


@dataclass(frozen=True)
class Pass:
    """Rows x [N, D] bf16 for a layer of `slow_model`, and the state before them.

    kind: "linear_attn", "self_attn", or "layer" for a whole layer of either kind of mixer.
    """

    model: Model
    layer: int
    kind: str
    x: Tensor
    state: DeltaState | KVCache
    length: int

    @property
    def node(self) -> nn.Module:
        layer = self.model.layers[self.layer]
        return layer if self.kind == "layer" else layer.get_submodule(self.kind)

    def rows(self, first: int, last: int) -> "Pass":
        return Pass(self.model, self.layer, self.kind, self.x[first:last], self.state, self.length)


def a_pass(
    kind: str, rows: int, *, name: str = "397B-A17B", length: int = 8, scale: float = 1.0,
    linear: bool = True, fp8: bool = False, **sizes: Any,
) -> Pass:  # fmt: skip
    model = slow_model(name, **sizes)
    config = model.config
    layer = 0 if kind == "linear_attn" or (kind == "layer" and linear) else 3
    x = (random(rows, rows, config.hidden_size) * scale).bfloat16()
    state: DeltaState | KVCache
    if layer == 0:
        heads = config.linear_num_value_heads
        sizes_of = (1, heads, config.linear_key_head_dim, config.linear_value_head_dim)
        conv = (random(1, 1, config.linear_conv_kernel_dim - 1, config.conv_dim) * scale).bfloat16()
        state = DeltaState(conv, random(2, *sizes_of) * 0.3)
    else:
        G, K = config.num_key_value_heads, config.head_dim
        state = (FP8KVCache if fp8 else KVCache).empty((1, G, K), torch.bfloat16, CPU)
        if length:
            # For an FP8 cache, the scales differ from position to position.
            size = 2.0 ** (torch.arange(length) % 5)[:, None] if fp8 else torch.ones(length, 1)
            k, v = random(3, 1, G, length, K), random(4, 1, G, length, K) * size
            state.append(k.bfloat16(), v.bfloat16())
    return Pass(model, layer, kind, x, state, length)


@dataclass(frozen=True)
class Outcome:
    """The result of a pass: out [N, D], and the state after each row, by name, with the rows
    first."""

    out: Tensor
    state: dict[str, Tensor]


def slow(what: Pass, dtype: torch.dtype) -> Outcome:
    """The result of the reference in a dtype, row by row."""
    node = copy.deepcopy(what.node).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    outputs: list[Tensor] = []
    left: dict[str, list[Tensor]] = {}
    if isinstance(what.state, DeltaState):
        state: Any = DeltaState(what.state.conv.to(dtype), what.state.recurrent.to(wide))
    elif isinstance(what.state, FP8KVCache):
        state = what.state.copy()
    else:
        state = KVCache(what.state.k.to(dtype), what.state.v.to(dtype), length=what.length)
    for row in what.x.to(dtype):
        outputs.append(node(row[None, None], state)[0, 0])
        for key, tensor in numbers(state).items():
            last = tensor[0, :, -1] if isinstance(state, KVCache) else tensor[0]
            left.setdefault(key, []).append((last[-1] if key == "conv" else last).clone())
    return Outcome(torch.stack(outputs), {key: torch.stack(held) for key, held in left.items()})


def numbers(state: DeltaState | KVCache) -> dict[str, Tensor]:
    """The tensors of a state, by name. e4m3 numbers are multiplied by their scales, in float64."""
    held = state.tensors()
    if isinstance(state, FP8KVCache):
        return {
            key: from_e4m3(held[key], held[f"{key}_scale"], torch.float64) for key in ("k", "v")
        }
    return held


@cache
def fast_node(node: nn.Module) -> Any:
    kinds = {"GatedDeltaNet": GatedDeltaNet, "GatedAttention": GatedAttention}
    kind: Any = kinds.get(type(node).__name__, DecoderLayer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.from_reference(copy.deepcopy(node), TARGET)


def buffers(what: Pass, capacity: int, start: int, slots: int) -> Delta | Keys:
    """The state in the fast path's buffers. All other places hold NaN."""
    config = what.model.config
    if isinstance(what.state, DeltaState):
        own = Delta.empty(config, slots, CPU)
        own.projected.fill_(torch.nan)
        own.states.fill_(torch.nan)
        own.take(what.state, start)
        # Rows before position 0 count as zeros, whatever the buffer holds there.
        before = what.state.conv.shape[1]
        own.projected[[p % RING for p in range(start - before, 0)]] = torch.nan
        return own
    kind = "fp8" if isinstance(what.state, FP8KVCache) else "auto"
    keys = Keys.empty(config, capacity, CPU, kind)
    for tensor in (keys.keys, keys.values):
        tensor.copy_(torch.full_like(tensor, torch.nan, dtype=torch.bfloat16))
    for scale in (keys.key_scales, keys.value_scales):
        scale.fill_(255)  # NaN in e8m0
    keys.take(what.state, what.length)
    return keys


def fast(
    what: Pass, *, capacity: int = 64, start: int | None = None, seed: int | None = None, batch: int = 32,
    state: Delta | Keys | None = None, slots: int = 8,
) -> Outcome:  # fmt: skip
    """Run one pass in the emulator. start: the position of the first row, for a delta net."""
    config, node, N = what.model.config, fast_node(what.node), len(what.x)
    begin = what.length if start is None else start
    own = buffers(what, capacity, begin, slots) if state is None else state
    position = torch.tensor([begin], dtype=torch.int32)
    scratch = Scratch(CPU)
    rope = rope_table(config.rotary_dim, config.rope_theta, capacity, CPU)
    more = [rope] if isinstance(own, Keys) else []
    if what.kind == "layer":
        ids = torch.arange(N, dtype=torch.int32)
        first, stream = embedded(what.x, ids, node.input_layernorm, TARGET, scratch)
        rest, out = node.launches(stream, own, position, rope, scratch, None)
        launches = [first, *rest]
    else:
        launches, out = node.launches(what.x, own, position, *more, scratch)
    emulated(launches, seed=seed, batch=batch)
    assert not counters(launches)
    if isinstance(own, Keys):
        new = slice(begin, begin + N)
        held = what.state.copy()
        assert isinstance(held, KVCache)
        own.give(held, begin + N)
        left = {key: rows[0, :, new].transpose(0, 1) for key, rows in numbers(held).items()}
    else:
        C = config.conv_dim
        places = [begin + i for i in range(N)]
        left = {
            "conv": own.projected[[p % RING for p in places], :C],
            "recurrent": own.states[[p % len(own.states) for p in places]],
        }
    return Outcome(out.clone(), {key: tensor.clone() for key, tensor in left.items()})


def node_findings(what: Pass, **settings: Any) -> list[str]:
    """The findings of a pass, on its output and on the state after each row."""
    try:
        got = fast(what, **settings)
    except EmulatorError as error:
        return [f"memory: {error}"]
    except AssertionError as error:
        return [f"arrived: {error}"]
    yardstick, truth = slow(what, torch.bfloat16), slow(what, torch.float64)
    found = judged("out", got.out, yardstick.out, truth.out)
    left = slow(unrounded(what), torch.float64).state
    for key, held in got.state.items():
        found += judged(key, held, yardstick.state[key], left[key])
    return found


def unrounded(what: Pass) -> Pass:
    """The same pass with a cache that does not round new keys and values to e4m3, because a number
    midway between two e4m3 values may be rounded to either."""
    if not isinstance(what.state, FP8KVCache):
        return what
    k, v = numbers(what.state).values()
    return replace(what, state=KVCache(k, v, length=what.length))


def rounding_findings(what: Pass) -> list[str]:
    """Findings on new values in e4m3: bytes and scales have to be those of the reference. One byte
    in a hundred may differ, because the projections may differ in the last place."""
    own = buffers(what, 64, what.length, 8)
    assert isinstance(own, Keys)
    fast(what, state=own)
    G, _, K = own.values.shape
    projected = (what.x.float() @ fast_node(what.node).in_proj.float().T).bfloat16()
    values = projected[:, -G * K :].view(-1, G, K).transpose(0, 1)  # [G, N, K]
    numbers, scales = to_e4m3(values)
    new = slice(what.length, what.length + len(what.x))
    same = own.values[:, new].view(torch.uint8) == numbers.view(torch.uint8)
    found = [] if same.float().mean() > 0.98 else [f"numbers: {int((~same).sum())} bytes differ"]
    return found + ([] if torch.equal(own.value_scales[:, new], scales) else ["numbers: scales"])


def row_findings(what: Pass, parts: Sequence[int], **settings: Any) -> list[str]:
    """Findings on bits that differ between passes of `parts` rows each and one pass over all
    rows."""
    try:
        return _row_findings(what, parts, **settings)
    except EmulatorError as error:
        return [f"memory: {error}"]


def _row_findings(what: Pass, parts: Sequence[int], **settings: Any) -> list[str]:
    whole = fast(what, **settings)
    begin = what.length if settings.get("start") is None else settings["start"]
    own = buffers(what, settings.get("capacity", 64), begin, settings.get("slots", 8))
    found, first = [], 0
    for count in parts:
        part = fast(
            what.rows(first, first + count), state=own, **(settings | {"start": begin + first})
        )
        rows = slice(first, first + count)
        same = {"out": (part.out, whole.out[rows])}
        same |= {key: (held, whole.state[key][rows]) for key, held in part.state.items()}
        found += [
            f"bits: {name} of rows {first} to {first + count - 1}"
            for name, (a, b) in same.items()
            if not torch.equal(a, b)
        ]
        first += count
    return found
