"""The delta rule token by token and by chunks, against each other and against scalar loops.

Three implementations of the same mathematics: `recurrent`, `chunk`, and `by_scalars` below, which
is numpy on one head and one channel at a time, written from the formula and from nothing else.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from qwen35.cache import DeltaState
from qwen35.config import Config
from reference.deltanet import GatedDeltaNet, causal_conv1d, chunk, l2norm, recurrent
from reference.linear import GRID
from tests.support.family import FAMILY, small_model
from tests.support.oracle import random, relative, within_twice

LENGTHS = (1, 63, 64, 65, 130, 500)
B, HV, K, V = 1, 2, 16, 12  # K != V; K^-1/2 is a power of two

# log decay: the whole range of use, next to no decay (g near 0), and a memory wiped by each token.
DECAYS = {
    "usual": (-1.5, -0.01),
    "weak": (-1e-6, 0.0),
    "strong": (-20.0, -5.0),
    "mixed": (-20.0, 0.0),
}
# strength of the correction: none, usual, and the old value replaced by the new.
STRENGTHS = {"usual": (0.1, 0.9), "none": (0.0, 1e-6), "full": (1 - 1e-6, 1.0), "mixed": (0.0, 1.0)}

Rule = Callable[..., tuple[Tensor, list[Tensor]]]


def between(low: float, high: float, *shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def inputs(
    T: int, decay: str = "usual", strength: str = "usual", scale: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of a rule in float64, exactly representable in float32. The state is not zero."""
    made = {
        "q": l2norm(random(B, T, HV, K, seed=seed, dtype=torch.float64)) * K**-0.5,
        "k": l2norm(random(B, T, HV, K, seed=seed + 1, dtype=torch.float64)),
        "v": random(B, T, HV, V, seed=seed + 2, dtype=torch.float64, scale=scale),
        "g": between(*DECAYS[decay], B, T, HV, seed=seed + 3),
        "beta": between(*STRENGTHS[strength], B, T, HV, seed=seed + 4),
        "state": random(B, HV, K, V, seed=seed + 5, dtype=torch.float64, scale=scale),
    }
    return {name: x.float().double() for name, x in made.items()}


def run(
    rule: Rule, arguments: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    cast = {name: x.to(dtype) for name, x in arguments.items()}
    return rule(
        cast["q"], cast["k"], cast["v"], g=cast["g"], beta=cast["beta"], state=cast["state"]
    )


@cache
def by_scalars(
    T: int, decay: str = "usual", strength: str = "usual", scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The delta rule by scalars, for `inputs`: read-outs [B, T, HV, V] and the state after each token [T,
    B, HV, K, V].

    The last axis of the loops, V, is independent from column to column, so it may stay a vector.
    """
    arguments = inputs(T, decay, strength, scale)
    q, k, v, g, beta = (arguments[name].numpy() for name in ("q", "k", "v", "g", "beta"))
    S = arguments["state"].numpy().copy()
    read, states = np.zeros((B, T, HV, V)), np.zeros((T, B, HV, K, V))
    for b in range(B):
        for h in range(HV):
            for t in range(T):
                recalled = np.zeros(V)
                for i in range(K):
                    S[b, h, i] *= np.exp(g[b, t, h])  # the memory decays first,
                    recalled += S[b, h, i] * k[b, t, h, i]  # then it is asked,
                for i in range(K):
                    correction = beta[b, t, h] * (v[b, t, h] - recalled)
                    S[b, h, i] += k[b, t, h, i] * correction  # then corrected,
                    read[b, t, h] += S[b, h, i] * q[b, t, h, i]  # then read.
                states[t, b, h] = S[b, h]
    return torch.from_numpy(read), torch.from_numpy(states)


def theirs(rule: Rule, arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """transformers' form of the same rule in float32, which scales q itself: outputs and last state."""
    forms = {recurrent: torch_recurrent_gated_delta_rule, chunk: torch_chunk_gated_delta_rule}
    q, k, v, g, beta, state = (x.float() for x in arguments.values())
    return forms[rule](
        q * K**0.5, k, v, g=g, beta=beta, initial_state=state, output_final_state=True
    )


def check_float32(arguments: dict[str, Tensor], read: Tensor, last: Tensor) -> None:
    """Both rules in float32, against float64 outputs and last state: the two-times rule.

    The chunked form takes the decay between two tokens from the difference of two sums over the chunk:
    where strong and weak decay mix, the sums are large (64 tokens of -10 are -640, whose float32
    neighbour is 6e-5 away) and the difference is small. That is the form's own weakness, transformers'
    too, so each form is held to transformers' own of that form.
    """
    for rule in (recurrent, chunk):
        got, states = run(rule, arguments, torch.float32)
        their_read, their_last = theirs(rule, arguments)
        assert got.dtype == states[-1].dtype == torch.float32
        for pair in ((got, their_read, read), (states[-1], their_last, last)):
            error, most = within_twice(*pair)
            assert error <= most, rule.__name__


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", LENGTHS)
def test_float64(T: int, decay: str, scale: float) -> None:
    """Both rules against the scalar loops: outputs and all states, 1e-12."""
    arguments = inputs(T, decay, scale=scale)
    read, states = by_scalars(T, decay, scale=scale)
    ends = [*range(GRID - 1, T - 1, GRID), T - 1]  # the tokens that close a chunk
    for rule, places in ((recurrent, range(T)), (chunk, ends)):
        got, got_states = run(rule, arguments, torch.float64)
        assert relative(got, read) < 1e-12, rule.__name__
        assert len(got_states) == len(places)
        assert relative(torch.stack(got_states), states[list(places)]) < 1e-12, rule.__name__


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_extremes_of_decay_and_strength(decay: str, strength: str) -> None:
    arguments = inputs(130, decay, strength)
    read, states = by_scalars(130, decay, strength)
    for rule in (recurrent, chunk):
        got, got_states = run(rule, arguments, torch.float64)
        assert relative(got, read) < 1e-12, rule.__name__
        assert relative(got_states[-1], states[-1]) < 1e-12, rule.__name__
    check_float32(arguments, read, states[-1])


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", LENGTHS)
def test_float32(T: int, decay: str, scale: float) -> None:
    arguments = inputs(T, decay, scale=scale)
    read, states = run(recurrent, arguments, torch.float64)  # which test_float64 has checked
    check_float32(arguments, read, states[-1])


def test_recurrent_returns_the_state_after_each_token() -> None:
    """A pass over the first tokens leaves the same bits as the whole pass left after them."""
    arguments = inputs(4)
    _, states = run(recurrent, arguments, torch.float32)
    before = arguments["state"].clone()
    for t in range(1, 5):
        prefix = {n: x if n == "state" else x[:, :t] for n, x in arguments.items()}
        _, of_prefix = run(recurrent, prefix, torch.float32)
        assert torch.equal(of_prefix[-1], states[t - 1])
    assert torch.equal(arguments["state"], before)  # and nobody wrote on the one that came in
    assert len({s.data_ptr() for s in states}) == 4


@pytest.mark.parametrize("rule", [recurrent, chunk])
def test_passes_continue(rule: Rule) -> None:
    """Two passes with the state handed on are the one long pass, to the bit on the grid."""
    arguments = inputs(130)
    whole, states = run(rule, arguments, torch.float32)
    first = {n: x if n == "state" else x[:, :GRID] for n, x in arguments.items()}
    read_1, states_1 = run(rule, first, torch.float32)
    second = {n: x[:, GRID:] for n, x in arguments.items() if n != "state"} | {
        "state": states_1[-1]
    }
    read_2, states_2 = run(rule, second, torch.float32)
    assert torch.equal(torch.cat((read_1, read_2), 1), whole)
    assert torch.equal(states_2[-1], states[-1])


def test_chunk_does_not_overflow() -> None:
    """64 tokens of log decay -20 reach exp(1280) above the diagonal, unless masked before."""
    arguments = inputs(128, "strong")
    arguments["g"].fill_(-20.0)
    got, states = run(chunk, arguments, torch.float32)
    assert got.isfinite().all() and states[-1].isfinite().all()
    read, last = run(recurrent, arguments, torch.float64)
    check_float32(arguments, read, last[-1])


def test_no_drift() -> None:
    """512 single steps with the state kept in float32, against float64: errors do not pile up.

    Decay as weak as the family's slowest heads have it. The last quarter must be no worse than twice the
    first, and the end no worse than twice transformers' own end.
    """
    arguments = inputs(512, "weak")
    read, states = run(recurrent, arguments, torch.float64)
    _, got_states = run(recurrent, arguments, torch.float32)
    errors = [relative(a, b) for a, b in zip(got_states, states, strict=True)]
    assert max(errors[384:]) < 2 * max(errors[:128])
    check_float32(arguments, read, states[-1])


# --- the convolution and its state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 65])
def test_convolution(T: int, dtype: torch.dtype) -> None:
    """Compared with torch's conv1d in float64; other dtypes may err twice as much as conv1d in them."""
    columns = random(2, 10, 3 + T, seed=1, dtype=dtype)
    weight = random(10, 1, 4, seed=2, dtype=dtype, scale=0.5)
    got = causal_conv1d(columns.transpose(1, 2), weight)
    truth = F.silu(F.conv1d(columns.double(), weight.double(), groups=10)).transpose(1, 2)
    assert got.shape == (2, T, 10)
    if dtype == torch.float64:
        assert relative(got, truth) < 1e-12
    else:
        yardstick = F.silu(F.conv1d(columns, weight, groups=10)).transpose(1, 2)
        error, most = within_twice(got, yardstick, truth)
        assert error <= most


def test_convolution_is_causal_and_its_last_tap_is_now() -> None:
    """A change in column t reaches outputs t to t + 3 and no other."""
    columns = random(1, 5, 3 + 10, seed=3, dtype=torch.float64)
    weight = random(5, 1, 4, seed=4, dtype=torch.float64)
    changed = columns.clone()
    changed[:, :, 3 + 4] += 1.0  # token 4
    before, after = (causal_conv1d(x.transpose(1, 2), weight) for x in (columns, changed))
    differs = (before != after).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_convolution_reads_nothing_before_its_columns() -> None:
    """The columns may be a view into memory that holds NaN on either side."""
    around = torch.full((2, 40, 10), torch.nan)
    around[:, 10:20] = random(2, 10, 10, seed=5, dtype=torch.float32)
    view = around[:, 10:20]
    weight = random(10, 1, 4, seed=6, dtype=torch.float32)
    assert torch.equal(causal_conv1d(view, weight), causal_conv1d(view.clone(), weight))


@pytest.mark.parametrize("cuts", [(64, 1), (64, 64, 2), (128, 4, 1, 3), (1, 1, 1, 1, 1)])
def test_state_carries_over_passes(cuts: tuple[int, ...]) -> None:
    """The module over pieces of a prompt gives the outputs and states of one pass, in float64."""
    layer = small_model("27B", dtype=torch.float64).layers[0].linear_attn
    x = random(2, sum(cuts), 64, seed=7, dtype=torch.float64)
    whole_state, state = fresh_state(layer), fresh_state(layer)
    whole = layer(x, whole_state)
    pieces = torch.cat([layer(part, state) for part in x.split(cuts, dim=1)], dim=1)
    assert relative(pieces, whole) < 1e-12
    assert relative(state.conv, whole_state.conv) < 1e-12
    assert relative(state.recurrent, whole_state.recurrent) < 1e-12
    raw = layer.in_proj_qkv(x)[:, -3:]  # the last raw rows
    assert relative(state.conv[:, -raw.shape[1] :], raw) < 1e-12


def fresh_state(layer: torch.nn.Module) -> DeltaState:
    channels = layer.conv1d.weight.shape[0]
    heads = (layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)
    return DeltaState(
        torch.zeros(2, 3, channels, dtype=torch.float64),
        torch.zeros(2, *heads, dtype=torch.float64),
    )


@pytest.mark.parametrize("gate_type", ["swish", "sigmoid"])
def test_the_config_chooses_the_gate(gate_type: str) -> None:
    """Every published model has swish; this is the only place where the other is the model's."""
    config = replace(Config.from_dict(FAMILY["397B-A17B"]), output_gate_type=gate_type)
    assert f"gate={gate_type}" in repr(GatedDeltaNet(config).norm)
