"""The delta net's three launches as gfx950 code in the emulator, beside the reference."""

import pytest
import torch

pytest.importorskip("triton")

from fast.state import RING, Delta
from qwen35.cache import DeltaState
from qwen35.errors import InputError
from tests.support.fast_cases import CPU
from tests.support.fast_nodes import a_pass, fast_node, node_findings, row_findings


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8])
def test_outputs_and_the_state_after_each_row(rows: int, scale: float):
    assert not node_findings(a_pass("linear_attn", rows, scale=scale))


@pytest.mark.parametrize("name", ["27B", "Qwen3-Next", "4B"])
def test_other_head_counts(name: str):
    assert not node_findings(a_pass("linear_attn", 3, name=name))


@pytest.mark.parametrize("sizes", [
    {"linear_key_head_dim": 64, "linear_value_head_dim": 16},
    {"linear_key_head_dim": 16, "linear_value_head_dim": 128},
    {"linear_conv_kernel_dim": 2}, {"linear_conv_kernel_dim": 3}, {"linear_conv_kernel_dim": 8},
    {"output_gate_type": "sigmoid"}, {"rms_norm_eps": 0.5},
])  # fmt: skip
def test_other_sizes_taps_and_gates(sizes: dict[str, object]):
    assert not node_findings(a_pass("linear_attn", 3, **sizes))


def test_the_published_head_sizes():
    sizes = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_value_heads": 4}
    assert not node_findings(a_pass("linear_attn", 4, **sizes))


@pytest.mark.parametrize("start", [3, 7, 13, 14, 16, 1000])
def test_wherever_the_ring_begins(start: int):
    assert not node_findings(a_pass("linear_attn", 4), start=start)


@pytest.mark.parametrize("parts", [(1, 1, 1, 1), (2, 2), (3, 1), (1, 3)])
def test_rows_have_the_same_bits_in_one_pass_and_in_several(parts: tuple[int, ...]):
    assert not row_findings(a_pass("linear_attn", 4), parts, start=14)


@pytest.mark.parametrize("settings", [{"seed": 1}, {"seed": 2}, {"batch": 1}])
def test_whoever_arrives_last_the_bits_are_the_same(settings: dict[str, int]):
    from tests.support.fast_nodes import fast

    what = a_pass("linear_attn", 3, linear_value_head_dim=64)
    plain, other = fast(what), fast(what, **settings)
    assert torch.equal(plain.out, other.out)
    assert torch.equal(plain.state["recurrent"], other.state["recurrent"])


def test_the_number_of_slots_decides_no_bit():
    """The number of slots depends on the depth of drafting; the same machine code must serve all."""
    from tests.support.fast_nodes import fast

    what = a_pass("linear_attn", 1)
    compiled = {slots: fast(what, slots=slots) for slots in (1, 2, 4, 8)}
    for other in compiled.values():
        assert torch.equal(other.out, compiled[1].out)
        assert torch.equal(other.state["recurrent"], compiled[1].state["recurrent"])


def test_a_rejected_row_leaves_no_trace():
    """After a pass of four rows, two of which are kept, the next rows are as if there had been two."""
    from tests.support.fast_nodes import buffers, fast

    what = a_pass("linear_attn", 4)
    own = buffers(what, 64, 8, 4)
    fast(what, state=own, start=8, slots=4)
    after = fast(what.rows(2, 4), state=own, start=10, slots=4)
    assert torch.equal(after.out, fast(what, start=8, slots=4).out[2:])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 100])
def test_a_state_comes_back_from_its_buffers_bit_for_bit(length: int):
    what = a_pass("linear_attn", 1)
    assert isinstance(what.state, DeltaState)
    own = Delta.empty(what.model.config, 4, CPU)
    own.take(what.state, length)
    back = DeltaState(torch.zeros_like(what.state.conv), torch.zeros_like(what.state.recurrent))
    own.give(back, length)
    assert torch.equal(back.conv, what.state.conv)
    assert torch.equal(back.recurrent, what.state.recurrent)
    assert len(own.projected) == RING


def test_the_four_projections_become_parts_of_one_matrix_and_exist_once():
    node = fast_node(a_pass("linear_attn", 1).node)
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    parts = [getattr(node.many, name).weight for name in names]
    assert torch.equal(torch.cat(parts), node.in_proj)
    held = node.in_proj.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() == held for part in parts)


def test_a_pass_begins_where_all_rows_that_it_reads_exist():
    """At the position that the kernels read, an int32."""
    what = a_pass("linear_attn", 1, linear_conv_kernel_dim=3)
    own, start, rope = fast_node(what.node).begin(what.x[None], what.state)
    assert start.dtype == torch.int32 and start.tolist() == [2] and rope is None
    assert own.projected.shape == (RING, len(fast_node(what.node).in_proj))


def test_its_weights_take_no_gradients():
    node = fast_node(a_pass("linear_attn", 1).node)
    assert not [name for name, weight in node.named_parameters() if weight.requires_grad]


@pytest.mark.parametrize("name", ["key", "value"])
def test_head_sizes_that_are_no_power_of_two_are_refused(name: str):
    with pytest.raises(
        InputError, match=f"a delta net of {name} head size 24; expected a power of"
    ):
        fast_node(a_pass("linear_attn", 1, **{f"linear_{name}_head_dim": 24}).node)


def test_several_sequences_go_through_the_reference_over_the_same_weights():
    what = a_pass("linear_attn", 9)
    node, state = fast_node(what.node), what.state
    assert isinstance(state, DeltaState)
    mine, theirs = (
        DeltaState(state.conv.repeat(2, 1, 1), state.recurrent.repeat(2, 1, 1, 1)) for _ in range(2)
    )
    x = what.x.repeat(2, 1, 1)
    assert torch.equal(node(x, mine), what.node(x, theirs))
    assert torch.equal(mine.recurrent, theirs.recurrent)  # pyright: ignore
