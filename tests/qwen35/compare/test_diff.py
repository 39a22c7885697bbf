"""A diff is checked in both directions: what is broken is named, and what is whole passes.

Each fault is planted in one node of a candidate, as a class that stands for it or as one wrong tensor of
a folder, and the first row of the report must be that node. Then healthy candidates (other dtypes, other
roundings inside a node, other lengths), and what the report says of shapes, places and counts.
"""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import reference.attention
import reference.deltanet
from qwen35.cache import DeltaState
from qwen35.compare.diff import diff
from qwen35.load import TINY
from reference.deltanet import GatedDeltaNet
from reference.norm import RMSNorm
from tests.support.checkpoints import (
    edit_tensors,
    write,
)
from tests.support.diffs import (  # noqa: F401
    ATTENTION,
    BY_PHASE,
    DELTA,
    FAULTS,
    IDS,
    IN_BOTH,
    MEMBERS,
    PREFIX,
    SIZES,
    assert_passes,
    assert_placed,
    decay_after_the_read,
    embedding_one_row_off,
    failing,
    folder,
    random_ids,
    router_of_the_next_experts,
    scale_embedding,
    standing_in,
    top_k_one_fewer,
)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A folder of each member and seed, written when first asked for."""
    made: dict[tuple[str, int], Path] = {}

    def of(name: str, seed: int) -> Path:
        if (name, seed) not in made:
            member, dialect, sizes = MEMBERS[name]
            made[name, seed] = tmp_path_factory.mktemp(name)
            write(made[name, seed], member, dialect, seed=seed, **sizes)
        return made[name, seed]

    return of


# --- faults: forwards that are slightly wrong. Each is a function (module, its arguments) -> its output.


@pytest.mark.parametrize(("name", "dtype"), IN_BOTH)
def test_a_fault_is_placed(name: str, dtype: torch.dtype, folder: Path) -> None:
    """Its stage alone is compared, to save time: the rows are those of a whole run (tested below)."""
    node, forward = FAULTS[name]
    stage = ".".join(node.split(".")[: 2 if node.startswith("layers") else 1])
    swaps = [(node, standing_in(forward))]
    assert_placed(diff(folder, IDS, swaps=swaps, dtype=dtype, decode=1, stages=stage.__eq__), node)


@pytest.mark.parametrize(
    "name", ["embedding_one_row_off", "decay_after_the_read", "router_of_the_next_experts"]
)
def test_a_fault_is_placed_among_all_stages(name: str, folder: Path) -> None:
    """The stages after it are given what the oracle computed, and stay clean."""
    node, forward = FAULTS[name]
    assert_placed(diff(folder, IDS, swaps=[(node, standing_in(forward))]), node)


@pytest.mark.parametrize("name", sorted(BY_PHASE))
def test_a_state_fault_shows_after_the_first_pass(name: str, folder: Path) -> None:
    """A short prompt is prefilled in one pass, whose rows are right. The rows of decode are not."""
    node, forward = FAULTS[name]
    report = diff(folder, IDS[:30], swaps=[(node, standing_in(forward))], dtype=torch.float32)
    assert report.rows[0].node == node
    assert {row.phase for row in failing(report)} == {"decode"}


def test_a_chunk_that_does_not_carry(folder: Path) -> None:
    """Inside one pass: only a prompt of 192 tokens and more has a pass of two chunks."""

    def forward(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
        healthy = reference.deltanet.chunk

        def wrong(
            q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor
        ) -> Any:
            outputs, states = [], []
            for parts in zip(*(t.split(64, 1) for t in (q, k, v, g, beta)), strict=True):
                read, after = healthy(*parts[:3], g=parts[3], beta=parts[4], state=state)
                state = torch.zeros_like(state)
                outputs.append(read)
                states += after
            return torch.cat(outputs, 1), states

        with mock.patch.object(reference.deltanet, "chunk", wrong):
            return GatedDeltaNet.forward(self, x, state)

    swaps = [(DELTA, standing_in(forward))]
    report = diff(folder, random_ids(198), swaps=swaps, stages="layers.0".__eq__)
    assert_placed(report, DELTA)


def test_a_router_with_fewer_experts(folder: Path) -> None:
    swaps = [("layers.0.mlp.gate", standing_in(top_k_one_fewer))]
    assert_placed(diff(folder, IDS, swaps=swaps), "layers.0.mlp.gate")


def test_no_eps(tmp_path: Path) -> None:
    """Seen where the inputs are small: an embedding of a hundredth."""
    write(tmp_path, *MEMBERS["moe"][:2], **SIZES)
    edit_tensors(tmp_path, scale_embedding)

    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        bare = copy.copy(self)
        bare.eps = 0.0
        return RMSNorm.forward(bare, x)

    node = "layers.0.input_layernorm"
    assert_placed(diff(tmp_path, IDS[:9], swaps=[(node, standing_in(forward))]), node)


# --- faults of a loader: a folder with one wrong tensor


def gate_and_up_in_other_order(tensors: dict[str, Tensor]) -> None:
    fused = tensors[f"{PREFIX}.0.mlp.experts.gate_up_proj"]
    fused[3] = fused[3].roll(len(fused[3]) // 2, 0)


def edited(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return edit


LINEAR, FULL = f"{PREFIX}.0.linear_attn", f"{PREFIX}.1.self_attn"


# 2 key heads of 16, 8 value heads of 24: 32 rows of q, 32 of k, 192 of v
WRONG_TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], None]]] = {
    "one expert's gate and up exchanged": ("layers.0.mlp.experts", gate_and_up_in_other_order),
    "experts one off": (
        "layers.1.mlp.experts",
        edited(f"{PREFIX}.1.mlp.experts.down_proj", lambda t: t.roll(1, 0)),
    ),
    "k before q": (
        f"{DELTA}.in_proj_qkv",
        edited(f"{LINEAR}.in_proj_qkv.weight", lambda t: torch.cat((t[32:64], t[:32], t[64:]))),
    ),
    "taps reversed": (DELTA, edited(f"{LINEAR}.conv1d.weight", lambda t: t.flip(-1))),
    "A_log of the next head": (DELTA, edited(f"{LINEAR}.A_log", lambda t: t.roll(1))),
    "dt_bias of the next head": (DELTA, edited(f"{LINEAR}.dt_bias", lambda t: t.roll(1))),
    "norm around one": (f"{DELTA}.norm", edited(f"{LINEAR}.norm.weight", lambda t: t - 1)),
    "heads of another order": (
        f"{ATTENTION}.o_proj",
        edited(f"{FULL}.o_proj.weight", lambda t: t.roll(32, 1)),
    ),
    "a transposed square": (
        f"{ATTENTION}.k_proj",
        edited(f"{FULL}.k_proj.weight", lambda t: t.t()),
    ),
    "router's rows one off": (
        "layers.1.mlp.gate",
        edited(f"{PREFIX}.1.mlp.gate.weight", lambda t: t.roll(1, 0)),
    ),
    "halves of fc": ("mtp.fc", edited("mtp.fc.weight", lambda t: t.roll(64, 1))),
    "one row of the head": (
        "lm_head",
        edited("lm_head.weight", lambda t: torch.cat((t[1:], t[:1]))),
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_a_wrong_tensor_is_placed(name: str, folder: Path, tmp_path: Path) -> None:
    node, edit = WRONG_TENSORS[name]
    write(tmp_path, *MEMBERS["moe"][:2], seed=7, **SIZES)
    edit_tensors(tmp_path, edit)
    assert_placed(diff(folder, IDS[:20], candidate=tmp_path, decode=2), node)


# --- what is whole passes


LENGTHS = (2, 5, 63, 64, 65, 70, 130)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("seed", range(10))
def test_the_reference_passes(seed: int, member: str, members: Any) -> None:
    """Ten seeds; over them all lengths, both modes, oracles and dtypes take their turns."""
    ids = random_ids(LENGTHS[(seed + len(member)) % len(LENGTHS)], seed)
    assert_passes(
        diff(
            members(member, seed),
            ids,
            dtype=DTYPES[seed // 2 % 2],
            mode="local" if seed % 2 else "free",
            decode=seed % 7 if seed > 6 else 1,
            oracle_dtype=torch.float64 if seed % 3 == 0 else torch.float32,
        )
    )


def test_one_token(members: Any) -> None:
    assert_passes(diff(members("moe", 0), [3]))


def test_one_token_free(members: Any) -> None:
    assert_passes(diff(members("moe", 0), [3], mode="free"))


@pytest.mark.parametrize("mode", ["local", "free"])
def test_the_embedded_model_passes(mode: Any) -> None:
    ids = torch.randint(2000, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    report = diff(TINY, ids, mode=mode, decode=1, stages=lambda s: s in ("layers.0", "layers.3"))
    assert_passes(report)


def wider(dtype: torch.dtype) -> Any:
    """A node that computes all inside in `dtype` and rounds what it returns once, its state too."""

    def cast(value: Any, kind: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            return value.to(kind) if value.is_floating_point() else value
        return value

    class Wider:
        @classmethod
        def from_reference(cls, module: nn.Module) -> nn.Module:
            fresh = copy.deepcopy(module).to(dtype)
            healthy = fresh.forward

            @wraps(healthy)
            def forward(*arguments: Any) -> Any:
                inside = [cast(a, dtype) for a in arguments]
                states = [i for i, a in enumerate(arguments) if is_dataclass(a)]
                for i in states:
                    inside[i] = copy.copy(arguments[i])
                    for f in fields(inside[i]):
                        setattr(inside[i], f.name, cast(getattr(inside[i], f.name), dtype))
                out = healthy(*inside)
                for i in states:
                    for f in fields(inside[i]):
                        held, new = getattr(arguments[i], f.name), getattr(inside[i], f.name)
                        kind = held.dtype if isinstance(held, Tensor) else dtype
                        setattr(arguments[i], f.name, cast(new, kind))
                if isinstance(out, tuple):
                    return out[0], out[1].float()
                return cast(out, arguments[0].dtype)

            fresh.forward = forward
            return fresh

    return Wider


WIDER = [
    "layers.0", "layers.1", "mtp", "*.linear_attn", "*.self_attn", "*layernorm", "*_proj", "*.mlp",
    "lm_head", "norm", "*.gate", "*.experts", "*.shared_expert", "*.shared_expert_gate", "*.k_norm",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WIDER)))
def test_a_better_node_passes(number: int, members: Any) -> None:
    """Fewer roundings than the yardstick: other errors, none larger."""
    member = "moe" if number % 2 else "next"
    inside = torch.float64 if number % 3 else torch.float32
    ids = random_ids(LENGTHS[number % len(LENGTHS)], number)
    swaps = [(WIDER[number], wider(inside))]
    folder = members(member, number % 10)
    report = diff(folder, ids, swaps=swaps, dtype=torch.bfloat16, decode=1)
    assert_passes(report)
    assert any(row.x_bf16 < 1 for row in report.rows if row.bf16)


FREE = [("dense", 0, "*.linear_attn"), ("dense", 1, "layers.0")] + [
    (member, seed, pattern)
    for seed, pattern in enumerate(
        [
            "layers.0",
            "layers.1",
            "mtp",
            "*.linear_attn",
            "*.self_attn",
            "*.mlp",
            "*.experts",
            "*.gate",
        ]
    )
    for member in ("moe", "next")
]


@pytest.mark.parametrize(("member", "seed", "pattern"), FREE)
def test_a_better_node_passes_free(member: str, seed: int, pattern: str, members: Any) -> None:
    """Its errors go on, other ones than the yardstick's, and flip experts: a verdict all the same."""
    swaps = [(pattern, wider(torch.float64))]
    ids = random_ids((9, 30, 70, 130)[seed % 4], seed)
    report = diff(members(member, seed), ids, swaps=swaps, dtype=torch.bfloat16, mode="free")
    assert_passes(report)
    assert any(row.max_abs != row.bf16 for row in report.rows)


@pytest.mark.parametrize("name", list(FAULTS)[::3])
def test_a_fault_is_seen_free(name: str, folder: Path) -> None:
    """In mode "free" the error goes on to later nodes, so the first row may be another node. The
    faulty one is among those that fail."""
    node, forward = FAULTS[name]
    swaps = [(node, standing_in(forward))]
    report = diff(folder, IDS, swaps=swaps, dtype=torch.bfloat16, mode="free")
    assert node in {row.node for row in failing(report)}
