"""The multi-token-prediction head by itself: its launches on a model whose numbers are exact
(`tests/support/coded_model.py`), and its passes over a prompt against the reference's."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import reference.mtp
from fast import hip
from fast.launch import Launch, Scratch, Work
from fast.moe import Experts
from fast.mtp import MTP
from fast.prefill.span import Span
from fast.state import Keys
from fast.step import Step
from qwen35.cache import KVCache
from qwen35.config import Config
from reference.quantized import MXFP4Linear
from tests.support.coded_model import (
    STATES,
    D,
    Turns,
    after,
    coded_model,
    coded_mtp,
    hidden,
    read,
    weight_of_head,
)
from tests.support.family import FAMILY, randomise
from tests.support.fast_cases import CPU, quantised
from tests.support.plain_launches import in_turn

TARGET = "gfx950"


def reference_mtp(name: str, seed: int = 0, **changes: Any) -> reference.mtp.MTP:
    made = reference.mtp.MTP(Config.from_dict(FAMILY[name] | changes))
    randomise(made, seed)
    return made.bfloat16().eval().requires_grad_(False)


# ---- a pass of a few rows


def passed(
    head: MTP, ids: list[int], states: list[int], table: Tensor, start: int
) -> tuple[list[Work], Tensor]:
    """The work of a pass over rows (token, state of the token before), which has run if there are no
    ranks, and its output."""
    step = Step(coded_model(TARGET, weight_of_head()), 32, 1)
    given = (
        torch.tensor(ids, dtype=torch.int32), torch.stack([hidden(state) for state in states]),
        table, step.state.mtp, torch.tensor([start], dtype=torch.int32),
        (step.state.cosine, step.state.sine),
    )  # fmt: skip
    scratch = Scratch(CPU)
    with torch.device("meta"):  # its buffers lie where the table does
        work, out = head.launches(*given, scratch)  # pyright: ignore
    (product,) = (one for one in work if isinstance(one, Launch) and "mtp_fc" in one.name)
    assert product.arguments["out"] is scratch("residual", len(ids), D)  # the layers' own buffer
    if head.layer.ranks is None:
        in_turn(work)
    return work, out


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_pass_reads_each_token_with_the_state_before_it(rows: int):
    ids = [7, 7, 190, 0, 33, 199, 5, 64][:rows]
    states = [9, *[after(9, 7), after(after(9, 7), 7)]]
    while len(states) < rows:
        states.append(after(states[-1], ids[len(states) - 1]))
    table = torch.eye(D, dtype=torch.bfloat16)[:200]
    work, out = passed(coded_mtp(TARGET), ids, states[:rows], table, 0)
    wanted = [STATES + after(s, t) for s, t in zip(states, ids, strict=False)]
    assert out.shape == (rows, D) and out.argmax(1).tolist() == wanted
    assert [one.name for one in work if isinstance(one, Launch)] == [
        f"mtp_input D={D}", f"mtp_fc N={D} K={2 * D}",
    ]  # fmt: skip
    assert isinstance(work[0], Launch) and work[0].grid == (rows, 2, 1)
    assert work[0].arguments["eps"] == 3 / D and work[0].options == {"num_warps": 4}


def test_an_id_that_is_none_reads_a_row_of_the_table():
    """A round's first pass has rows beyond the text, and -1 where a logit was NaN."""
    table = torch.eye(D, dtype=torch.bfloat16)[:150]
    for given, taken in ((-1, 0), (150, 149), (10**6, 149)):
        _, out = passed(coded_mtp(TARGET), [given], [9], table, 0)
        assert out.argmax().item() == STATES + after(9, taken)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_with_a_part_of_the_table_reads_all_tokens(size: int):
    everyone: list[dict[int, Tensor]] = [{} for _ in range(size)]
    table = torch.eye(D, dtype=torch.bfloat16)[:200]
    share = 200 // size
    ids, states = [3, 199, 101], read([1, 3, 199])
    works, outs = [], []
    for rank in range(size):
        head = coded_mtp(TARGET)
        head.layer.ranks = Turns(rank, size, everyone)
        work, out = passed(head, ids, states, table[rank * share : (rank + 1) * share], 0)
        works.append(work)
        outs.append(out)
    assert [one.name for one in works[0] if isinstance(one, Launch)] == [
        f"embed_part D={D}", f"mtp_input D={D}", f"mtp_fc N={D} K={2 * D}",
    ]  # fmt: skip
    for at_once in zip(*works, strict=True):
        in_turn(at_once)
    wanted = [STATES + after(s, t) for s, t in zip(states, ids, strict=True)]
    assert all(out.argmax(1).tolist() == wanted for out in outs)


# ---- called as a module


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
@pytest.mark.parametrize("name", ["27B", "397B-A17B"])
@pytest.mark.parametrize("rows", [9, 70])
def test_a_prompts_rows_are_the_references(name: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    """The norms and the product are the fast path's; the layer in between is the reference's, and goes on
    in the given cache."""
    slow = reference_mtp(name)

    def work(
        layer: Any, x: Tensor, state: Keys, span: Span, rope: Any, scratch: Scratch
    ) -> tuple[list[Work], Tensor]:
        assert layer is quick.layer and state.keys.data_ptr() == caches[1].k.data_ptr()
        assert (int(span.start), int(span.filled), span.end) == (3, rows, 3 + rows)
        assert len(rope[0]) == len(rope[1]) == state.keys.shape[1]
        out = torch.full_like(x, torch.nan)

        def run_layer() -> None:
            out.copy_(slow.layers[0](x[None], caches[1])[0])
            caches[1].rollback(rows)  # kernels do not count them

        return [run_layer], out

    ran: list[torch.device] = []

    def run(todo: list[Work], device: torch.device) -> None:
        ran.append(device)
        in_turn(todo)

    monkeypatch.setattr("fast.mtp.on_layer", work)
    monkeypatch.setattr("fast.mtp.run", run)
    quick = MTP.from_reference(slow, TARGET)
    D = slow.fc.weight.shape[0]
    generator = torch.Generator().manual_seed(rows)
    x, h = (torch.randn(1, rows + 3, D, generator=generator).bfloat16() for _ in range(2))
    caches = [cache_of(name, dtype) for dtype in (torch.bfloat16, torch.bfloat16, torch.float64)]
    first, rest = slice(0, 3), slice(3, rows + 3)
    exact = copy.deepcopy(slow).double()
    for node, cache in ((slow, caches[0]), (slow, caches[1]), (exact, caches[2])):
        node(x[:, first].to(cache.k.dtype), h[:, first].to(cache.k.dtype), cache)
    theirs = slow(x[:, rest], h[:, rest], caches[0])
    ours = quick(x[:, rest], h[:, rest], caches[1])
    truth = exact(x[:, rest].double(), h[:, rest].double(), caches[2])
    assert ours.shape == theirs.shape == (1, rows, D) and ours.dtype == torch.bfloat16
    assert caches[1].length == rows + 3
    errors = [(out.double() - truth).norm() for out in (ours, theirs)]
    assert errors[0] <= 2 * errors[1]
    assert ran == [CPU]


def cache_of(name: str, dtype: torch.dtype = torch.bfloat16) -> KVCache:
    config = Config.from_dict(FAMILY[name])
    return KVCache.empty((1, config.num_key_value_heads, config.head_dim), dtype, CPU)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (1, 8), (2, 1), (2, 9)])
def test_a_few_rows_and_several_sequences_go_through_the_layers_own_forward(
    batch: int, rows: int, monkeypatch: pytest.MonkeyPatch
):
    slow = reference_mtp("27B")
    quick = MTP.from_reference(slow, TARGET)
    asked: list[tuple[int, ...]] = []
    quick.many.layers[0].forward = lambda x, cache: asked.append(tuple(x.shape)) or x
    D = slow.fc.weight.shape[0]
    x, h = (torch.randn(batch, rows, D).bfloat16() for _ in range(2))
    out = quick(x, h, cache_of("27B"))
    normed = slow.pre_fc_norm_embedding(x), slow.pre_fc_norm_hidden(h)
    assert torch.equal(out, slow.norm(slow.fc(torch.cat(normed, -1))))
    assert asked == [(batch, rows, D)]


# ---- what it is made of


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
def test_the_reference_stays_as_it_is():
    slow = reference_mtp("397B-A17B")
    layer, mlp = slow.layers[0], slow.layers[0].mlp
    quick = MTP.from_reference(slow, TARGET)
    assert slow.layers[0] is layer and layer.mlp is mlp
    assert quick.layer is not layer and quick.layer.target == quick.target == TARGET
    for own, theirs in (
        (quick.fc, slow.fc), (quick.embedding_norm.weight, slow.pre_fc_norm_embedding),
        (quick.hidden_norm.weight, slow.pre_fc_norm_hidden), (quick.norm.weight, slow.norm),
    ):  # fmt: skip
        assert torch.equal(own, theirs.weight)


HIP = {
    "hidden_size": 256, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
    "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
def test_hip_kernels_are_taken_where_the_experts_are_mxfp4(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hip, "runtime", lambda: None)

    def kernel(made: reference.mtp.MTP, asked: str) -> str:
        return MTP.from_reference(made, TARGET, asked).layer.feed_forward.experts.kernel  # pyright: ignore

    def mxfp4() -> reference.mtp.MTP:
        made = reference_mtp("397B-A17B", **HIP)
        quantised(made.layers[0].mlp.experts, 5)  # pyright: ignore
        return made

    assert kernel(mxfp4(), "hip") == "hip" and kernel(mxfp4(), "triton") == "triton"
    assert MTP.from_reference(mxfp4(), TARGET).layer.feed_forward.experts.kernel == "triton"  # pyright: ignore
    plain = MTP(mxfp4(), TARGET).layer.feed_forward
    assert (plain.gate.kernel, plain.experts.kernel) == ("triton", "triton")  # pyright: ignore
    assert kernel(reference_mtp("397B-A17B", **HIP), "hip") == "triton"
    packed = mxfp4()
    assert isinstance(packed.layers[0].mlp.experts[0].gate_proj, MXFP4Linear)  # pyright: ignore
    packed.layers[0].mlp.experts = Experts.from_reference(  # pyright: ignore
        packed.layers[0].mlp.experts,
        TARGET,
        "hip",  # pyright: ignore
    )
    assert kernel(packed, "hip") == "hip"
    dense = MTP.from_reference(reference_mtp("27B"), TARGET, "hip")
    assert not hasattr(dense.layer.feed_forward, "experts")
