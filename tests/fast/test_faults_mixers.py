"""Planted faults in the kernels of products, the delta net and attention: the checks must find each."""

import pytest

pytest.importorskip("triton")

from tests.fast.test_faults import block_in_a_stream
from tests.support.fast_faults import Faults, as_tests
from tests.support.fast_nodes import a_pass, node_findings, rounding_findings, row_findings

FAULTS = Faults()
fault = FAULTS.add


# ---- the checks


def delta_net() -> list[str]:
    return node_findings(a_pass("linear_attn", 3), start=14)


def delta_net_early() -> list[str]:
    """Rows before position 0 hold garbage, and count as zeros."""
    what = a_pass("linear_attn", 3)
    what.state.tensors()["conv"].zero_()
    return node_findings(what, start=1)


def delta_net_in_parts() -> list[str]:
    return row_findings(a_pass("linear_attn", 4), (1, 3), start=14)


def sigmoid_delta_net() -> list[str]:
    return node_findings(a_pass("linear_attn", 2, output_gate_type="sigmoid"))


def attention() -> list[str]:
    """The rows lie on both sides of the edge of a piece of the context."""
    return node_findings(a_pass("self_attn", 5, length=125), capacity=256)


def attention_in_e4m3() -> list[str]:
    what = a_pass("self_attn", 5, length=125, fp8=True)
    near = a_pass("self_attn", 5, length=3, fp8=True)
    return node_findings(what, capacity=256) + rounding_findings(near)


def coarse_layer() -> list[str]:
    """A layer whose eps is as large as the mean square."""
    sizes = {"num_experts": 1, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 48}
    return node_findings(a_pass("layer", 3, rms_norm_eps=0.5, **sizes))


def layer() -> list[str]:
    sizes = {"num_experts": 1, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 48}
    return node_findings(a_pass("layer", 3, **sizes))


def dense_layer() -> list[str]:
    return node_findings(a_pass("layer", 3, name="27B", linear=False))


# ---- the faults


fault(
    "the first block's squares taken for all blocks", "linear", block_in_a_stream, "numbers",
    ("place = part * ROWS", "place = part * 0"),
)  # fmt: skip
fault(
    "the squares of the first block alone", "linear", block_in_a_stream, "numbers",
    ("mask=part < PARTS", "mask=part < 1"),
)  # fmt: skip
fault(
    "the squares of the row beside it", "linear", block_in_a_stream, "numbers unwritten",
    ("place = part * ROWS + tl.arange(0, ROWS)", "place = part * ROWS + (tl.arange(0, ROWS) ^ 1)"),
)  # fmt: skip
fault(
    "squares left of the sum before it is rounded", "linear", block_in_a_stream, "numbers",
    ("kept = tl.where(inside, value.to(tl.bfloat16).to(tl.float32), 0.0)",
     "kept = tl.where(inside, value, 0.0)"),
)  # fmt: skip
fault(
    "a mixer's projection without the norm's rms", "linear", layer, "numbers",
    ("acc *= inverse_rms(squares, K, eps, PARTS, ROWS)[None, :]", "acc *= 1.0"),
)  # fmt: skip
fault("eps forgotten", "linear", coarse_layer, "numbers", ("/ width + eps)", "/ width)"))
fault(
    "a norm whose weight is w, not 1 + w",
    "linear",
    layer,
    "numbers",
    ("factor = 1 + tl", "factor = tl"),
)
fault(
    "sums of squares of the rows without the residual", "linear", layer, "numbers",
    ("        if HAS_RESIDUAL:\n            acc +=",
     "        kept = acc\n        if HAS_RESIDUAL:\n            acc +="),
    ("store_scaled(acc, next_norm", "store_scaled(kept, next_norm"),
)  # fmt: skip
fault(
    "sums of squares of one block of columns alone", "linear", layer, "numbers unwritten",
    ("tl.store(squares + block * ROWS", "tl.store(squares + 0 * block * ROWS"),
)  # fmt: skip
fault("a residual forgotten", "linear", dense_layer, "numbers", ("if HAS_RESIDUAL:", "if False:"))
fault(
    "a dense layer's gate and up swapped", "linear", dense_layer, "numbers",
    ("gate, up = acc", "up, gate = acc"),
)  # fmt: skip
fault(
    "rows of the ring one place further", "linear", delta_net, "numbers unwritten",
    ("(tl.load(start) + row) % RING", "(tl.load(start) + row + 1) % RING"),
)  # fmt: skip
fault("decay after the read", "deltanet", delta_net, "numbers",
    ("recalled = tl.sum(key[:, None] * decayed, 0)", "recalled = tl.sum(key[:, None] * state, 0)"),
)  # fmt: skip
fault(
    "decay by a instead of softplus",
    "deltanet",
    delta_net,
    "numbers",
    ("softplus(step))", "(step))"),
)
fault("A_log without its exp", "deltanet", delta_net, "numbers",
    ("rate = tl.exp(tl.load(decay_log + head))", "rate = tl.load(decay_log + head)"))  # fmt: skip
fault("dt_bias forgotten", "deltanet", delta_net, "numbers", ("tl.float32) + bias", "tl.float32)"))
fault("a and b swapped", "deltanet", delta_net, "numbers",
    ("tl.load(line + b), tl.load(line + b + HV)", "tl.load(line + b + HV), tl.load(line + b)"),
)  # fmt: skip
fault("beta without its sigmoid", "deltanet", delta_net, "numbers",
    ("strength = 1 / (1 + tl.exp(-next_b.to(tl.float32)))", "strength = next_b.to(tl.float32)"),
)  # fmt: skip
fault("the query not scaled", "deltanet", delta_net, "numbers", (" * (K**-0.5)", ""))
fault("the key not normalised", "deltanet", delta_net, "numbers",
    ("        key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)\n", ""))  # fmt: skip
fault(
    "the delta rule without the delta",
    "deltanet",
    delta_net,
    "numbers",
    ("(value - recalled)", "value"),
)
fault("key heads tiled, not interleaved", "deltanet", delta_net, "numbers",
    ("head // (HV // H)", "head % H"))  # fmt: skip
fault("q and k swapped", "deltanet", delta_net, "numbers",
    ("q_at, k_at, v_at = key_head * K + k, (H + key_head) * K + k,",
     "q_at, k_at, v_at = (H + key_head) * K + k, key_head * K + k,"))  # fmt: skip
fault(
    "each row computed with what the first one reads", "deltanet", delta_net, "numbers",
    ("first + tl.minimum(row + 1, rows - 1)", "first"),
)  # fmt: skip
fault(
    "the taps in reverse",
    "deltanet",
    delta_net,
    "numbers",
    ("* TAPS + tap\n", "* TAPS + TAPS - 1 - tap\n"),
)
fault("SiLU after the convolution forgotten", "deltanet", delta_net, "numbers",
    ("return total / (1 + tl.exp(-total))", "return total"))  # fmt: skip
fault("rows before position 0 taken from the ring", "deltanet", delta_net_early, "unwritten",
    (" & (at >= 0)", ""))  # fmt: skip
fault("the state of the row before the last one", "deltanet", delta_net, "numbers unwritten",
    ("((first - 1) & (slots - 1))", "((first - 2) & (slots - 1))"))  # fmt: skip
# With it the compiler leaves out the wait for a write-back of the caches, which is an error by itself.
fault("the state left once, not after each row", "deltanet", delta_net_in_parts, "bits unwritten memory",
    ("states + (position & (slots - 1)) * SIZE", "states + ((first + rows - 1) & (slots - 1)) * SIZE"),
)  # fmt: skip
fault(
    "the gate a sigmoid where it is SiLU",
    "deltanet",
    delta_net,
    "numbers",
    ("if not SIGMOID", "if False"),
)
fault("the gate SiLU where it is a sigmoid", "deltanet", sigmoid_delta_net, "numbers",
    ("if not SIGMOID", "if True"))  # fmt: skip
fault("the head's mean over one block of columns", "deltanet", delta_net, "numbers",
    ("sum_of_squares / V + eps", "sum_of_squares / BLOCK_V + eps"),
)  # fmt: skip
fault("the head's norm of the first row alone", "deltanet", delta_net, "unwritten numbers",
    ("there = m < rows", "there = m < 1"))  # fmt: skip
fault("the delta net's counter not set back", "deltanet", delta_net, "arrived",
    ("        tl.store(arrived + head, 0)\n", ""))  # fmt: skip
fault("attention without its scale", "attention", attention, "numbers",
    (" * (K**-0.5 * LOG2_E)", " * LOG2_E"))  # fmt: skip
fault("RoPE turns the other way", "attention", attention, "numbers",
    ("tl.where(k < HALF, -crossed, crossed)", "tl.where(k < HALF, crossed, -crossed)"))  # fmt: skip
fault("RoPE on all channels", "attention", attention, "numbers memory",
    ("turns = valid & (k < ROTARY)", "turns = valid"))  # fmt: skip
fault("neighbouring channels are pairs", "attention", attention, "numbers",
    ("tl.where(k < HALF, k + HALF, tl.where(k < ROTARY, k - HALF, k))", "tl.where(k < ROTARY, k ^ 1, k)"),
)  # fmt: skip
fault("q norm's weight is w, not 1 + w", "attention", attention, "numbers",
    ("raw * scale * (1 + tl", "raw * scale * (tl"))  # fmt: skip
fault("a row sees the rows behind it", "attention", attention, "numbers",
    ("score = tl.where(p[None, :] <= position, ", "score = tl.where(p[None, :] < end, "))  # fmt: skip
fault("query heads in turns over the key heads", "attention", attention, "numbers",
    ("query_head = head * SHARED + m % SHARED", "query_head = m % SHARED * G + head"))  # fmt: skip
fault("gate and query swapped", "attention", attention, "numbers",
    ("source = projected + row * M + query_head * 2 * K\n",
     "source = projected + row * M + query_head * 2 * K + K\n"))  # fmt: skip
fault("the gate without its sigmoid", "attention", attention, "numbers",
    ("/ (1 + tl.exp(-gate))", "* gate"))  # fmt: skip
fault("new keys written only in the first piece", "attention", attention, "unwritten",
    ("tl.maximum(first, begin), end, NEW)",
     "first, tl.minimum(end, begin + (1 - tl.minimum(piece, 1)) * NEAR), NEW)"),
)  # fmt: skip
fault("peaks of the pieces ignored", "attention", attention, "numbers unwritten",
    ("acc += tl.sum(tl.exp2(peak - level) * part, 0)", "acc += tl.sum(part, 0)"))  # fmt: skip
fault("the last piece forgotten", "attention", attention, "numbers unwritten",
    ("count = _pieces(tl.load(start) + row + 1, NEAR, FAR)",
     "count = _pieces(tl.load(start) + row + 1 - NEAR, NEAR, FAR)"),
)  # fmt: skip
fault("the softmax not rescaled between tiles", "attention", attention, "numbers",
    ("acc = tl.dot(share.to(tl.bfloat16), value, acc * fade)",
     "acc = tl.dot(share.to(tl.bfloat16), value, acc)"))  # fmt: skip
fault("keys without their scales", "attention", attention_in_e4m3, "numbers",
    (" * key_scale[None, :]", ""))  # fmt: skip
fault("values without their scales", "attention", attention_in_e4m3, "numbers",
    ("share * from_e8m0(tl.maximum(below + 127, 0))[None, :]", "share"))  # fmt: skip
fault("the scale of another position", "attention", attention_in_e4m3, "numbers unwritten",
    ("tl.load(value_scales + held + after, ", "tl.load(value_scales + held + lane, "))  # fmt: skip
fault("values without the piece's largest scale", "attention", attention_in_e4m3, "numbers",
    (".reshape(BLOCK, K) * from_e8m0(largest)", ".reshape(BLOCK, K)"))  # fmt: skip
fault("even and odd channels swapped", "attention", attention_in_e4m3, "numbers",
    ("tl.join(even, odd)", "tl.join(odd, even)"))  # fmt: skip
fault("odd channels of the keys left out", "attention", attention_in_e4m3, "numbers",
    ("score = tl.dot(odd_query, tl.trans(odd_key), score)\n", "score += 0\n"))  # fmt: skip
fault("odd channels of the values not rescaled between tiles", "attention", attention_in_e4m3,
    "numbers", ("odd = tl.dot(share, odd_value, odd * fade)", "odd = tl.dot(share, odd_value, odd)"),
)  # fmt: skip
fault("totals not rescaled between tiles", "attention", attention, "numbers",
    ("total = total * fade + share", "total = total + share"))  # fmt: skip
fault("totals of the pieces not rescaled", "attention", attention, "numbers",
    ("tl.sum(tl.exp2(peak - higher) * held, 0)", "tl.sum(held, 0)"))  # fmt: skip
fault("a scale so large that small numbers lose bits", "attention", attention_in_e4m3, "numbers",
    ("(bits >> 23) - 8 +", "(bits >> 23) - 2 +"))  # fmt: skip
fault("a scale so small that large numbers have no e4m3", "attention", attention_in_e4m3,
    "numbers unwritten", (" + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)", " - 1"))  # fmt: skip
fault("new values without their scale", "attention", attention_in_e4m3, "numbers",
    ("small = wide * from_e8m0(254 - exponent)", "small = wide"))  # fmt: skip


test_a_fault_is_found, test_without_a_fault_nothing_is_found = as_tests(FAULTS, __name__)
