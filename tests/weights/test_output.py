"""The plan of a conversion: what becomes of a parameter, what a rank holds, which file has it."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35.config import Config
from qwen35.errors import InputError
from tests.support.checkpoints import (
    MXFP4,
    MXFP4_CHANNEL,
    QWEN3_5_FP8,
    QWEN3_6,
    edit_tensors,
    write,
)
from tests.support.conversions import LITTLE, MEMBER
from tests.support.family import FAMILY
from weights import fp8, mxfp4, rounding
from weights.checkpoint import Checkpoint
from weights.entry import Entry
from weights.output import (
    WHAT,
    Item,
    Options,
    Slot,
    arrange,
    check_choice,
    convert_tensor,
    cut,
    fit,
    is_chosen,
    items_of,
)
from weights.rounding import Rounding
from weights.shard import Shard
from weights.storage import Stored

E4M3, BF16, U8 = torch.float8_e4m3fn, torch.bfloat16, torch.uint8
NAME = "model.layers.0.mlp.up_proj.weight"


def stored(tensor: Tensor, name: str = NAME, file: str = "a") -> Stored:
    return Stored(name, Path(file), tensor.dtype, tuple(tensor.shape), lambda: tensor)


def plain(*shape: int, name: str = NAME, file: str = "a", dtype: torch.dtype = BF16) -> Entry:
    torch.manual_seed(0)
    return Entry(stored(torch.randn(shape).to(dtype), name, file), shape)


def of_fp8(
    N: int, K: int, scale: tuple[int, ...], block: tuple[int, int] = (128, 128), file: str = "a"
) -> Entry:
    numbers, scales = torch.randn(N, K).to(E4M3), torch.rand(scale).bfloat16() + 0.5
    held = stored(scales, f"{NAME}_scale_inv", file)
    return Entry(stored(numbers), (N, K), "fp8", held, block)


def of_mxfp4(N: int, K: int) -> Entry:
    numbers = torch.randint(0, 256, (N, K // 2), dtype=U8)
    scales = torch.randint(120, 130, (N, K // 32), dtype=U8)
    return Entry(stored(numbers), (N, K), "mxfp4", stored(scales, f"{NAME}_scale"))


def line(call: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as raised:
        call(*arguments)
    return str(raised.value)


# --- slots


@pytest.mark.parametrize(
    ("entry", "to", "format", "slots"),
    [
        (plain(3, 64), "copy", "plain", [("", BF16, (3, 64), (1, 1))]),
        (plain(3, 64, dtype=torch.float32), "bf16", "plain", [("", BF16, (3, 64), (1, 1))]),
        (
            plain(3, 64), "mxfp4", "mxfp4",
            [("", U8, (3, 32), (1, 2)), ("_scale", U8, (3, 2), (1, 32))],
        ),
        (
            plain(130, 257), "fp8", "fp8",
            [("", E4M3, (130, 257), (1, 1)), ("_scale_inv", BF16, (2, 3), (128, 128))],
        ),
        (
            of_mxfp4(3, 64), "copy", "mxfp4",
            [("", U8, (3, 32), (1, 2)), ("_scale", U8, (3, 2), (1, 32))],
        ),
        (
            of_fp8(130, 256, (2, 2)), "copy", "fp8",
            [("", E4M3, (130, 256), (1, 1)), ("_scale_inv", BF16, (2, 2), (128, 128))],
        ),
        (
            of_fp8(5, 64, (5, 1)), "copy", "fp8",
            [("", E4M3, (5, 64), (1, 1)), ("_scale_inv", BF16, (5, 1), (1, 0))],
        ),
        (
            of_fp8(5, 64, ()), "copy", "fp8",
            [("", E4M3, (5, 64), (1, 1)), ("_scale_inv", BF16, (), (0, 0))],
        ),
        (of_fp8(5, 64, ()), "bf16", "plain", [("", BF16, (5, 64), (1, 1))]),
    ],
)  # fmt: skip
def test_the_tensors_that_are_written_for_a_parameter(
    entry: Entry, to: Any, format: str, slots: list[tuple[Any, ...]]
) -> None:
    item = Item(NAME, entry, to)
    assert item.format == format
    expected = tuple(Slot(f"{NAME}{suffix}", *rest) for suffix, *rest in slots)
    assert item.slots() == expected
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape, _ in slots]
    assert [slot.nbytes for slot in expected] == sizes


def test_the_files_of_a_parameter() -> None:
    assert Item(NAME, plain(3, 64), "copy").files == ["a"]
    assert Item(NAME, of_fp8(5, 64, ()), "copy").files == ["a"]
    assert Item(NAME, of_fp8(5, 64, (), file="b"), "copy").files == ["a", "b"]


def test_groups_have_to_divide_a_row() -> None:
    said = line(Item(NAME, plain(3, 48), "mxfp4").slots)
    assert said == f"{NAME} has shape [3, 48]; MXFP4 needs a multiple of 32 on its last axis"


# --- the choice


@pytest.mark.parametrize(
    ("module", "experts", "all_linear"),
    [
        ("layers.3.mlp.experts.7.up_proj", True, True),
        ("layers.3.mlp.shared_expert.up_proj", False, True),
        ("layers.3.mlp.down_proj", False, True),
        ("layers.3.mlp.gate", False, False),
        ("layers.3.mlp.shared_expert_gate", False, False),
        ("layers.3.self_attn.q_proj", False, True),
        ("layers.3.linear_attn.in_proj_qkv", False, True),
        ("layers.3.linear_attn.in_proj_qkvz", False, True),
        ("layers.3.linear_attn.in_proj_a", False, False),
        ("mtp.layers.0.mlp.experts.7.up_proj", False, True),
        ("mtp.fc", False, False),
        ("lm_head", False, False),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.language_model."])
def test_what_is_chosen(module: str, experts: bool, all_linear: bool, prefix: str) -> None:
    if prefix and module.startswith(("mtp", "lm_head")):
        prefix = ""
    name = f"{prefix}{module}.weight"
    for to in ("mxfp4", "fp8"):
        assert is_chosen(name, Options(to)) is experts
        assert is_chosen(name, Options(to, "all-linear")) is all_linear
    assert not is_chosen(name, Options("bf16", "all-linear"))


def test_a_choice_of_nothing_is_refused() -> None:
    items = [Item(NAME, plain(3, 64), "copy")]
    check_choice(items, Options("bf16"), "here")
    check_choice([*items, Item(NAME, of_mxfp4(3, 64), "copy")], Options("mxfp4"), "here")
    assert [*WHAT] == ["experts", "all-linear"]
    assert line(check_choice, items, Options("mxfp4"), "here") == (
        "here: nothing to convert to mxfp4 (experts): the model has no such matrices; there is "
        "--what all-linear"
    )


ROUTED, MTP_ROUTED = r"layers\.\d\.mlp\.experts\..*", r"mtp.*\.mlp\.experts\..*"
SHARED, MTP_SHARED = r"layers\.\d\.mlp\.shared_expert\..*", r"mtp.*\.shared_expert\..*"
ATTENTION = r"layers\.\d\.(self_attn\..*_proj|linear_attn\.(in_proj_(qkv|z)|out_proj))\.weight"
MTP_ATTENTION = r"mtp.*\.self_attn\..*_proj\.weight"
LINEAR = f"{ROUTED}|{MTP_ROUTED}|{SHARED}|{MTP_SHARED}|{ATTENTION}|{MTP_ATTENTION}"
# A source, what is asked for, and what becomes of which parameters; all others are copied.
BECOMES: dict[str, tuple[Any, Options, dict[str, str]]] = {
    "experts of bf16": (QWEN3_6, Options("mxfp4"), {"mxfp4": ROUTED}),
    "bf16": (QWEN3_6, Options("fp8", "all-linear"), {"fp8": LINEAR}),
    "experts of fp8": (
        QWEN3_5_FP8, Options("mxfp4"),
        {"mxfp4": ROUTED, "bf16": f"{MTP_ROUTED}|{SHARED}|{MTP_SHARED}|{ATTENTION}|{MTP_ATTENTION}"},
    ),
    "fp8 to itself": (QWEN3_5_FP8, Options("fp8", "all-linear"), {}),
    "fp8 of experts to itself": (QWEN3_5_FP8, Options("fp8"), {}),
    "mxfp4 to itself": (MXFP4, Options("mxfp4"), {}),
    "more mxfp4": (
        MXFP4, Options("mxfp4", "all-linear"),
        {"mxfp4": f"{MTP_ROUTED}|{SHARED}|{MTP_SHARED}|{ATTENTION}|{MTP_ATTENTION}"},
    ),
    "mxfp4 beside fp8 by rows": (MXFP4_CHANNEL, Options("mxfp4"), {"bf16": ATTENTION}),
    "to fp8 by blocks": (MXFP4_CHANNEL, Options("fp8", "all-linear"), {"fp8": LINEAR}),
    "experts to fp8": (
        MXFP4_CHANNEL, Options("fp8"), {"fp8": f"{ROUTED}|{ATTENTION}", "bf16": SHARED}
    ),
    "decoded": (MXFP4_CHANNEL, Options("bf16"), {"bf16": f"{ROUTED}|{SHARED}|{ATTENTION}"}),
    "fp8 decoded": (QWEN3_5_FP8, Options("bf16", "all-linear"), {"bf16": LINEAR}),
}  # fmt: skip


@pytest.mark.parametrize("name", BECOMES)
def test_what_becomes_of_each_parameter(name: str, tmp_path: Path) -> None:
    """Fused experts that are quantised are written one by one, and others as they are. Scales of
    activations go with their format; those of keys stay."""
    dialect, options, becomes = BECOMES[name]
    sizes = LITTLE | {"shared_expert_intermediate_size": 32}
    write(tmp_path, MEMBER, replace(dialect, shards=1), **sizes)
    layer = "model.language_model.layers.1.self_attn"
    more = {f"{layer}.{name}": torch.ones(1) for name in ("k_scale", "q_proj.input_scale")}
    edit_tensors(tmp_path, lambda tensors: tensors.update(more))
    checkpoint = Checkpoint(tmp_path)
    found = {item.name: item for item in items_of(checkpoint, options)}
    expected = {f"{layer}.k_scale": "copy"}
    expected |= {n: "copy" for n in checkpoint.stored if "visual" in n}
    for stored_as, parts in checkpoint.parts.items():
        prefix = "" if stored_as.startswith(("mtp.", "lm_head.")) else "model.language_model."
        to = {
            part: next((to for to, names in becomes.items() if re.fullmatch(names, part)), "copy")
            for part in parts
        }
        if len(parts) > 1 and "copy" in to.values():
            expected[stored_as] = "copy"
        else:
            expected |= {prefix + part: one for part, one in to.items()}
    assert {n: item.to for n, item in found.items()} == expected
    for n, item in found.items():
        part = n.removeprefix("model.language_model.")
        if part in checkpoint.entries:
            assert item.entry.shape == checkpoint.entries[part].shape


def test_packed_weights_have_their_own_name(tmp_path: Path) -> None:
    write(tmp_path, MEMBER, replace(MXFP4, shards=1), **LITTLE)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [n for n, t in tensors.items() if t.dtype == U8 and n.endswith(".weight")]:
            tensors[f"{name}_packed"] = tensors.pop(name)

    edit_tensors(tmp_path, rename)
    checkpoint = Checkpoint(tmp_path)
    assert any(name.endswith("_packed") for name in checkpoint.parts)
    for to in ("mxfp4", "bf16"):
        names = {item.name for item in items_of(checkpoint, Options(to))}
        assert names >= {
            f"model.language_model.{n}" for n in checkpoint.entries if "layers.1.mlp.e" in n
        }
        assert not any(name.endswith("_packed") for name in names)


# --- ranks

DENSE = Config.from_dict(FAMILY["27B"] | {"intermediate_size": 256})
UP, DOWN, NORM = (
    f"model.layers.{i}.{rest}.weight"
    for i, rest in ((0, "mlp.up_proj"), (1, "mlp.down_proj"), (2, "input_layernorm"))
)


def test_a_rank_holds_its_part_of_each_tensor() -> None:
    items = [
        Item(UP, plain(256, 64, name=UP), "mxfp4"),
        Item(DOWN, plain(64, 256, name=DOWN), "mxfp4"),
        Item(NORM, plain(64, name=NORM), "copy"),
        Item(UP.replace("0", "4"), plain(256, 64, name=UP), "copy"),
    ]
    whole = fit(items, DENSE, 1)
    assert whole == [(item, item.slots()) for item in items]
    halves = fit(items, DENSE, 2)
    assert [item for item, _ in halves] == items
    assert [[slot.shape for slot in slots] for _, slots in halves] == [
        [(128, 32), (128, 2)], [(64, 64), (64, 4)], [(64,)], [(128, 64)]
    ]  # fmt: skip
    for (_, cut_slots), (_, slots) in zip(halves, whole, strict=True):
        assert [replace(slot, shape=()) for slot in cut_slots] == [
            replace(slot, shape=()) for slot in slots
        ]


def test_a_block_that_a_rank_would_split_is_refused() -> None:
    items = [Item(UP, plain(192, 64, name=UP), "fp8")]
    said = line(fit, items, replace(DENSE, intermediate_size=192), 2)
    assert said == (
        f"{UP}_scale_inv (fp8): the range 0..96 of axis 0 is not a multiple of 128, "
        "the elements that one entry stands for"
    )


@pytest.mark.parametrize(
    ("shard", "per", "rows", "columns"),
    [
        (Shard(None), (1, 2), (0, 4), (0, 6)),
        (Shard(0, ((2, 4),)), (1, 2), (2, 4), (0, 6)),
        (Shard(0, ((2, 4),)), (2, 0), (1, 2), (0, 6)),
        (Shard(0, ((2, 4),)), (0, 1), (0, 4), (0, 6)),
        (Shard(1, ((4, 8),)), (1, 2), (0, 4), (2, 4)),
        (Shard(1, ((4, 8),)), (1, 0), (0, 4), (0, 6)),
    ],
)
def test_what_several_elements_share_is_cut_with_them(
    shard: Shard, per: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    x = torch.arange(24).reshape(4, 6)
    assert torch.equal(cut(x, shard, per), x[slice(*rows), slice(*columns)])


def test_a_third_axis_is_cut_as_it_is() -> None:
    x = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(cut(x, Shard(2, ((1, 3),)), (1, 2)), x[:, :, 1:3])


# --- files


def test_files_are_filled_in_order() -> None:
    """Up to the limit and no further, from one source file each; one item may be larger."""
    sizes = [("a", 4), ("a", 6), ("a", 1), ("b", 3), ("b", 20), ("b", 2)]
    held = []
    for i, (file, size) in enumerate(sizes):
        item = Item(f"x{i}", plain(size, name=f"x{i}", file=file, dtype=torch.float16), "copy")
        held.append((item, item.slots()))
    files = arrange(held, 20)
    assert [[item.name for item, _ in file.items] for file in files] == [
        ["x0", "x1"], ["x2"], ["x3"], ["x4"], ["x5"]
    ]  # fmt: skip
    assert [file.nbytes for file in files] == [20, 2, 6, 40, 4]
    assert [file.sources for file in files] == [["a"], ["a"], ["b"], ["b"], ["b"]]
    assert [len(file.items) for file in arrange(held, 1000)] == [3, 3]


# --- numbers


def converted(entry: Entry, to: Any) -> tuple[list[Tensor], dict[str, Any]]:
    error = Rounding()
    return convert_tensor(entry, "x", to, error), error.summary()


def test_copies_are_the_stored_tensors() -> None:
    entry = plain(3, 64)
    (same,), said = converted(entry, "copy")
    assert same is entry.weight.read() and said["tensors"] == 0
    for entry in (of_fp8(5, 64, ()), of_mxfp4(3, 64)):
        numbers, scales = converted(entry, "copy")[0]
        assert entry.scale is not None
        assert numbers is entry.weight.read() and torch.equal(scales, entry.scale.read())
    e8m0 = stored(torch.full((3, 2), 127, dtype=U8).view(torch.float8_e8m0fnu), f"{NAME}_scale")
    _, scales = converted(replace(of_mxfp4(3, 64), scale=e8m0), "copy")[0]
    assert scales.dtype == U8 and bool((scales == 127).all())


@pytest.mark.parametrize("rows", [70, 128, 300])
def test_quantised_numbers_and_their_errors(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of each is that of the decoded numbers, whatever the pieces it is summed in."""
    monkeypatch.setattr(rounding, "MEASURED", rows * 320)
    entry = plain(300, 320, dtype=torch.float32)
    exact = entry.weight.read()
    results = {to: converted(entry, to) for to in ("bf16", "fp8", "mxfp4")}
    decoded = {
        "bf16": results["bf16"][0][0].float(),
        "fp8": fp8.dequantize(*results["fp8"][0], torch.float32),
        "mxfp4": mxfp4.dequantize(*results["mxfp4"][0], torch.float32),
    }
    for to, (tensors, said) in results.items():
        error = (decoded[to] - exact).double()
        relative = float(error.norm() / exact.double().norm())
        assert said["relative_rms"] == pytest.approx(relative, rel=1e-9), to
        shapes = [slot.shape for slot in Item("x", entry, to).slots()]  # pyright: ignore
        assert [tuple(tensor.shape) for tensor in tensors] == shapes
        assert 0 < relative < {"bf16": 0.003, "fp8": 0.04, "mxfp4": 0.2}[to]


def test_quantised_numbers_are_decoded_before_they_are_rounded() -> None:
    """What bfloat16 loses of e4m3 times a scale of float32 counts as an error."""
    scale = torch.tensor(1.2345678)
    numbers = torch.randn(8, 64).to(E4M3)
    entry = Entry(stored(numbers), (8, 64), "fp8", stored(scale, f"{NAME}_scale"))
    (rounded,), said = converted(entry, "bf16")
    exact = numbers.double() * scale.double()
    lost = float((rounded.double() - exact).norm() / exact.norm())
    assert lost > 0 and said["relative_rms"] == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("number", [math.inf, math.nan])
@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("bf16", "x holds an infinity or a NaN"),
        ("fp8", "x holds an infinity or a NaN"),
        (
            "mxfp4",
            "x holds an infinity, a NaN or a magnitude of 2^127 x 1.75 and more, which MXFP4 cannot "
            "hold",
        ),
    ],
)
def test_numbers_that_are_not_finite_are_refused(to: Any, said: str, number: float) -> None:
    tensor = torch.zeros(3, 64)
    tensor[1, 40] = number
    entry = Entry(stored(tensor), (3, 64))
    assert line(convert_tensor, entry, "x", to, Rounding()) == f"{NAME}: {said}"


def test_the_largest_number_of_mxfp4() -> None:
    tensor = torch.zeros(1, 32)
    tensor[0, 0] = 2.0**127 * 1.74
    convert_tensor(Entry(stored(tensor), (1, 32)), "x", "mxfp4", Rounding())
    tensor[0, 0] = 2.0**127 * 1.75
    said = line(convert_tensor, Entry(stored(tensor), (1, 32)), "x", "mxfp4", Rounding())
    assert said.startswith(f"{NAME}: x holds an infinity")
