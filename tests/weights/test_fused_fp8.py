"""FP8 folders of transformers' `save_pretrained`: experts fused with fused scales, experts one by one
beside fused scales, scales in e8m0, and scales beside weights that are not quantised."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen35.errors import InputError
from qwen35.load import load
from reference.quantized import FP8Linear
from tests.support.checkpoints import (
    E4M3,
    QUANTIZED_SIZES,
    QWEN3_5_FP8,
    SINGLE,
    Dialect,
    assert_names,
    edit_json,
    edit_tensors,
    logits_of,
    write,
    write_plain,
)
from tests.support.dialects import cli, quiet_load
from tests.support.family import FAMILY
from tests.weights.test_claims import inspected, loaded
from tests.weights.test_dialects import DTYPES, quantised_linears, rounded
from weights import mxfp4
from weights.checkpoint import Checkpoint
from weights.convert import convert
from weights.entry import entry_of
from weights.output import Options
from weights.storage import Stored

MEMBER = "397B-A17B"
SIZES = FAMILY[MEMBER] | QUANTIZED_SIZES
PREFIX = "model.language_model."
RUN = ("--prompt-ids", "5,6,7", "--max-new-tokens", 6, "--ignore-eos")
E, INNER, D = (
    SIZES["num_experts"],
    SIZES["moe_intermediate_size"],
    SIZES["hidden_size"],
)  # 8, 192, 160
E8M0 = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Fused:
    """How the scales of a layer's experts lie. gate_up, down: shape of one expert's. rows, down_rows:
    the row of its scales that serves each row. columns: how many numbers along K share a scale."""

    gate_up: tuple[int, ...]
    down: tuple[int, ...]
    rows: Callable[[Tensor], Tensor]
    down_rows: Callable[[Tensor], Tensor]
    columns: int
    dtype: torch.dtype = torch.float32
    block: tuple[int, int] | None = (128, 128)


def _blocks(
    tall: int, wide: int, gate_up_rows: int, rows: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Fused:
    return Fused(
        (gate_up_rows, -(-D // wide)), (-(-D // tall), -(-INNER // wide)), rows, lambda n: n // tall,
        wide, dtype, (tall, wide),
    )  # fmt: skip


def _each(n: Tensor) -> Tensor:
    return n


def _none(n: Tensor) -> Tensor:
    return n * 0


F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
# 384 rows of gate and up are three blocks of 128: the middle one holds rows of both.
FUSED = {
    "blocks through gate and up": _blocks(128, 128, 3, lambda n: n // 128, F32),
    "blocks of each": _blocks(128, 128, 4, lambda n: n // INNER * 2 + n % INNER // 128, F32),
    "blocks that end where gate ends": _blocks(64, 32, 6, lambda n: n // 64, BF16),
    "blocks of 160 rows, 384 = 2.4 of them": _blocks(160, 48, 3, lambda n: n // 160, F32),
    "blocks in e8m0": _blocks(128, 128, 3, lambda n: n // 128, E8M0),
    "blocks in bytes": _blocks(128, 128, 3, lambda n: n // 128, U8),
    "mxfp8": Fused((2 * INNER, D // 32), (D, INNER // 32), _each, _each, 32, U8),
    "one an expert": Fused((1, 1), (1, 1), _none, _none, 1 << 20, F32, None),
    "one an expert, flat": Fused((), (), _none, _none, 1 << 20, BF16, None),
    "one a row": Fused((2 * INNER, 1), (D, 1), _each, _each, 1 << 20, F32),
    "one a row, flat": Fused((2 * INNER,), (D,), _each, _each, 1 << 20, F32),
}


def random_experts(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], rows: Tensor, fused: Fused, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Every code -> numbers [E, N, K] in e4m3, scales [E, ...], values in float64 by tables."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(254, shape, generator=generator)
    codes += codes > 126  # 127 and 255 are NaN
    size = (E, *scale_shape)
    if fused.dtype in (U8, E8M0):
        middle = 127 - round(math.log2(150 * shape[-1] ** 0.5))
        powers = torch.randint(middle - 1, middle + 2, size, generator=generator)
        factors, scale = 2.0 ** (powers - 127).double(), powers.to(U8).view(fused.dtype)
    else:
        scale = (torch.rand(size, generator=generator) + 0.5) / (150 * shape[-1] ** 0.5)
        scale = scale.to(fused.dtype)
        factors = scale.double()
    columns = torch.arange(shape[-1]) // fused.columns
    table = factors.reshape(E, *scale_shape, *(1,) * (2 - len(scale_shape)))
    values = E4M3[codes] * table[:, rows][:, :, columns]
    return codes.to(U8).view(torch.float8_e4m3fn), scale, values


def write_fused(
    folder: Path, fused: Fused, layout: str, *, suffix: str = "_scale_inv", mtp: bool = False
) -> dict[str, Tensor]:
    """A folder whose experts are FP8. layout: "fused", or "one by one" beside fused scales."""
    expected = write(folder, MEMBER, Dialect(fused_mtp=True), **QUANTIZED_SIZES)
    blocks = [f"{PREFIX}layers.{i}.mlp.experts" for i in range(SIZES["num_hidden_layers"])]
    blocks += ["mtp.layers.0.mlp.experts"] * mtp

    def change(tensors: dict[str, Tensor]) -> None:
        for i, block in enumerate(blocks):
            rows = fused.rows(torch.arange(2 * INNER)), fused.down_rows(torch.arange(D))
            of = {
                "gate_up_proj": ((E, 2 * INNER, D), fused.gate_up, rows[0]),
                "down_proj": ((E, D, INNER), fused.down, rows[1]),
            }
            for leaf, (shape, scale_shape, places) in of.items():
                del tensors[f"{block}.{leaf}"]
                made = random_experts(shape, scale_shape, places, fused, 2 * i + len(leaf) % 2)
                numbers, tensors[f"{block}.{leaf}{suffix}"], values = made
                if layout == "fused":
                    tensors[f"{block}.{leaf}"] = numbers
                for name, whole, value in _matrices(block, leaf, numbers, values):
                    if layout == "one by one":
                        tensors[name] = whole.clone()
                    expected[name.removeprefix(PREFIX)] = value

    edit_tensors(folder, change)
    plain = ["re:(?!.*experts)", "re:.*shared_expert"] + ["mtp"] * (not mtp)
    claim = {"quant_method": "fp8", "modules_to_not_convert": plain}
    if fused.block is not None:
        claim["weight_block_size"] = list(fused.block)
    edit_json(folder / "config.json", quantization_config=claim)
    return expected


def _matrices(
    block: str, leaf: str, numbers: Tensor, values: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    for e in range(E):
        if leaf == "down_proj":
            yield f"{block}.{e}.down_proj.weight", numbers[e], values[e]
        else:
            yield f"{block}.{e}.gate_proj.weight", numbers[e, :INNER], values[e, :INNER]
            yield f"{block}.{e}.up_proj.weight", numbers[e, INNER:], values[e, INNER:]


@pytest.fixture(
    scope="module",
    params=[(name, layout) for name in FUSED for layout in ("fused", "one by one")],
    ids=lambda param: f"{param[1]}, {param[0]}",
)
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    """A folder of each layout, and its parameters, those of experts in float64."""
    path = tmp_path_factory.mktemp("fused")
    name, layout = request.param
    return path, write_fused(path, FUSED[name], layout)


Written = tuple[Path, dict[str, Tensor]]

# --- values -----------------------------------------------------------------------------------------


def test_entries_are_the_decoded_values(folder: Written) -> None:
    """Each dtype is tried. Shapes and formats are those of the parameters."""
    path, expected = folder
    checkpoint = Checkpoint(path)
    assert checkpoint.entries.keys() == expected.keys()
    assert (checkpoint.problems, checkpoint.notes, checkpoint.idle) == ([], [], {})
    for name, entry in checkpoint.entries.items():
        assert entry.shape == tuple(expected[name].shape)
        assert (entry.format == "fp8") == (expected[name].dtype == torch.float64)
        for dtype in DTYPES:
            assert torch.equal(entry.read(dtype), rounded(expected[name], dtype)), name


def test_logits_are_those_of_decoded_weights(folder: Written, tmp_path: Path) -> None:
    """Each routed expert is an FP8Linear; in every dtype the bits of a plain folder."""
    path, expected = folder
    for dtype in DTYPES:
        model = quiet_load(path, dtype)
        linears = quantised_linears(model)
        assert linears.keys() == {n for n, t in expected.items() if t.dtype == torch.float64}
        assert all(isinstance(linear, FP8Linear) for linear in linears.values())
        write_plain(tmp_path, expected, dtype, SIZES)
        assert torch.equal(logits_of(model), logits_of(quiet_load(tmp_path, dtype)))


@pytest.mark.parametrize("to", ["bf16", "mxfp4"])
def test_a_conversion_has_the_same_values(folder: Written, tmp_path: Path, to: Any) -> None:
    """One by one under the names of published folders: rounded once, or quantised from float32."""
    path, expected = folder
    convert(path, tmp_path / "out", Options(to))
    converted = Checkpoint(tmp_path / "out")
    assert (converted.problems, converted.notes) == ([], [])
    assert converted.entries.keys() == expected.keys()
    for name, exact in expected.items():
        entry = converted.entries[name]
        if exact.dtype != torch.float64:
            assert torch.equal(entry.read(torch.float32), exact)
        elif to == "bf16":
            assert entry.format == "plain"
            assert torch.equal(entry.read(), rounded(exact, torch.bfloat16))
        else:
            packed, powers = mxfp4.quantize(exact.float())
            assert entry.scale is not None
            assert torch.equal(entry.weight.read(), packed)
            assert torch.equal(entry.scale.read(), powers)


def test_inspect_counts_every_byte_once(
    folder: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    """It counts those of the weights and of the scales, however experts share scales."""
    path, _ = folder
    status, out = inspected(path, capsys)
    assert status == 0, out
    checkpoint = Checkpoint(path)
    stored = sum(s.nbytes for n, s in checkpoint.stored.items() if n not in checkpoint.ignored)
    assert abs(sum(entry.nbytes for entry in checkpoint.entries.values()) - stored) < 3 * 3 * E
    assert "routed experts  fp8" in out


def test_generate_runs(folder: Written, capsys: pytest.CaptureFixture[str]) -> None:
    """Six tokens and no warning."""
    status, out, err = cli(capsys, *RUN, "--model", folder[0])
    assert (status, len(out.split())) == (0, 6)
    assert "warning" not in err


def test_experts_stay_mapped(folder: Written) -> None:
    """Numbers are views of the file; nothing is decoded or copied at load but scales."""
    linears = quantised_linears(quiet_load(folder[0])).values()
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1


def test_without_inv_and_in_the_mtp_layer(tmp_path: Path) -> None:
    """`_scale` is the same; the MTP's experts fused too, and converted with the trunk's or not."""
    expected = write_fused(
        tmp_path / "in", FUSED["blocks through gate and up"], "fused", suffix="_scale", mtp=True
    )
    write_plain(tmp_path / "plain", expected, torch.bfloat16, SIZES)
    model = quiet_load(tmp_path / "in")
    assert len(quantised_linears(model)) == 3 * 3 * E
    assert torch.equal(logits_of(model), logits_of(quiet_load(tmp_path / "plain")))
    convert(tmp_path / "in", tmp_path / "out", Options("mxfp4"))
    converted = Checkpoint(tmp_path / "out")
    assert (converted.problems, converted.notes) == ([], [])
    for name, entry in converted.entries.items():
        if name.startswith("mtp.") and ".experts." in name:
            assert torch.equal(entry.read(), rounded(expected[name], torch.bfloat16))


def test_ranks_of_fused_experts(tmp_path: Path) -> None:
    """Each rank's part of BF16 experts, from FP8 ones."""
    expected = write_fused(tmp_path / "in", FUSED["blocks of each"], "fused")
    convert(tmp_path / "in", tmp_path / "out", Options("bf16", tp=2))
    name = "layers.1.mlp.experts.5.up_proj.weight"
    halves = []
    for rank in range(2):
        files = (tmp_path / "out" / f"rank-{rank}-of-2").glob("*.safetensors")
        halves += [t for file in files for n, t in load_file(file).items() if n == PREFIX + name]
    assert torch.equal(torch.cat(halves), rounded(expected[name], torch.bfloat16))


# --- bad scales -------------------------------------------------------------------------------------

LAYER = f"{PREFIX}layers.1.mlp.experts"
BAD: dict[str, tuple[Callable[[dict[str, Tensor]], object], list[str]]] = {
    "another number of experts": (
        lambda t: t.update({f"{LAYER}.gate_up_proj_scale_inv": torch.ones(7, 3, 2)}),
        [f"{LAYER}.gate_up_proj_scale_inv", "[7, 3, 2]", "[8, 3, 2]", "[8, 384, 1]", "[8, 1, 1]"],
    ),
    "blocks missing": (
        lambda t: t.update({f"{LAYER}.down_proj_scale_inv": torch.ones(8, 1, 2)}),
        [f"{LAYER}.down_proj_scale_inv", "[8, 1, 2]", "[8, 2, 2]"],
    ),
    "transposed": (
        lambda t: t.update({f"{LAYER}.gate_up_proj_scale_inv": torch.ones(8, 2, 3)}),
        [f"{LAYER}.gate_up_proj_scale_inv", "[8, 2, 3]", "[8, 3, 2]"],
    ),
    "one for all": (
        lambda t: t.update({f"{LAYER}.down_proj_scale_inv": torch.ones(())}),
        [f"{LAYER}.down_proj_scale_inv", "[]", "[8, 1, 1]"],
    ),
    "e4m3": (
        lambda t: t.update(
            {f"{LAYER}.down_proj_scale_inv": torch.ones(8, 2, 2).to(torch.float8_e4m3fn)}
        ),
        [f"{LAYER}.down_proj_scale_inv", "F8_E4M3", "F8_E8M0"],
    ),
    "none": (
        lambda t: t.pop(f"{LAYER}.down_proj_scale_inv"),
        [f"{LAYER}.", "down_proj", "F8_E4M3", "0 tensors of scales"],
    ),
}


@pytest.mark.parametrize("layout", ["fused", "one by one"])
@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD.keys())
def test_scales_that_do_not_fit_are_named(
    tmp_path: Path, layout: str, change: Callable[[dict[str, Tensor]], object], words: list[str]
) -> None:
    """The tensor, its shape, and the shapes that would do."""
    write_fused(tmp_path, FUSED["blocks through gate and up"], layout)
    edit_tensors(tmp_path, change)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_names(caught, words)


def test_both_kinds_of_scales_are_too_many(tmp_path: Path) -> None:
    """An expert with its own scales beside those of all."""
    write_fused(tmp_path, FUSED["blocks through gate and up"], "one by one")
    own = {f"{LAYER}.3.up_proj.weight_scale_inv": torch.ones(2, 2)}
    edit_tensors(tmp_path, lambda t: t.update(own))
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    assert_names(caught, [f"{LAYER}.3.up_proj.weight ", "2 tensors of scales"])


def test_a_fused_scale_without_experts(tmp_path: Path) -> None:
    """The scale is that of a layer that is not there."""
    write(tmp_path, MEMBER)
    orphan = {f"{PREFIX}layers.99.mlp.experts.down_proj_scale_inv": torch.ones(8, 2, 2)}
    edit_tensors(tmp_path, lambda t: t.update(orphan))
    with pytest.raises(InputError, match=r"layers\.99\.mlp\.experts\.down_proj_scale_inv has no"):
        Checkpoint(tmp_path)


def test_rows_that_cannot_be_told_apart(tmp_path: Path) -> None:
    """192 rows of gate and of up in blocks of 300: two blocks through both, or one for each."""
    two = _blocks(300, 128, 2, lambda n: n // 300, F32)
    write_fused(tmp_path, two, "fused")
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    assert_names(caught, [f"{PREFIX}layers.0.mlp.experts.gate_up_proj_scale_inv", "300", "192"])


@pytest.mark.parametrize("dtype", [F32, U8], ids=str)
def test_a_nan_scale_is_found_at_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    """Loading does not read experts; the run that hits one ends with status 2 and its name."""
    kind = "blocks in bytes" if dtype == U8 else "blocks through gate and up"
    write_fused(tmp_path, FUSED[kind], "fused")
    bad = 255 if dtype == U8 else math.nan
    edit_tensors(tmp_path, lambda t: t[f"{LAYER}.gate_up_proj_scale_inv"].fill_(bad))
    quiet_load(tmp_path)
    status, out, err = cli(capsys, *RUN, "--model", tmp_path)
    assert (status, out) == (2, "")
    assert f"{LAYER}.gate_up_proj: a scale is" in err
    assert err.count("\n") == 1


# --- matrices ---------------------------------------------------------------------------------------


ONE_FILE = replace(QWEN3_5_FP8, shards=1)
Q = "layers.1.self_attn.q_proj.weight"  # [512, 160]


def give_scale(folder: Path, scale: Tensor) -> Tensor:
    """Put another scale beside one matrix; its numbers, as they are without it, in float64."""
    edit_tensors(folder, lambda tensors: tensors.update({f"{PREFIX}{Q}_scale_inv": scale}))
    return E4M3[Checkpoint(folder).stored[PREFIX + Q].read().view(U8).int()]


@pytest.mark.parametrize("dtype", [E8M0, U8], ids=["e8m0", "bytes"])
@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [((4, 2), 128, 128), ((512, 5), 1, 32), ((512, 1), 1, 160), ((1, 1), 512, 160), ((), 512, 160)],
)
def test_scales_that_are_powers_of_two(
    tmp_path: Path, shape: tuple[int, ...], rows: int, columns: int, dtype: torch.dtype
) -> None:
    """A block's, MXFP8's 32 along K, a row's and a matrix's; 2^(byte - 127)."""
    expected = write(tmp_path, MEMBER, ONE_FILE, **QUANTIZED_SIZES)
    powers = torch.randint(100, 120, shape, generator=torch.Generator().manual_seed(0))
    numbers = give_scale(tmp_path, powers.to(U8).view(dtype))
    table = 2.0 ** (powers.reshape(shape or (1, 1)) - 127).double()
    values = numbers * table[torch.arange(512)[:, None] // rows, torch.arange(160) // columns]
    for wanted in DTYPES:
        read = Checkpoint(tmp_path).entries[Q].read(wanted)
        assert torch.equal(read, rounded(values, wanted))
    write_plain(tmp_path / "plain", expected | {Q: values}, BF16, SIZES)
    assert torch.equal(logits_of(quiet_load(tmp_path)), logits_of(load(tmp_path / "plain")))


def test_one_scale_a_matrix_in_two_axes(tmp_path: Path) -> None:
    """transformers writes shape [1, 1] if there are no blocks (`weight_block_size` null)."""
    write(tmp_path, MEMBER, ONE_FILE, **QUANTIZED_SIZES)
    claim = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    edit_json(tmp_path / "config.json", quantization_config=claim | {"weight_block_size": None})
    values = give_scale(tmp_path, torch.full((1, 1), 0.37)) * torch.tensor(0.37).double()
    read = Checkpoint(tmp_path).entries[Q].read(torch.float32)
    assert torch.equal(read, rounded(values, torch.float32))


def test_a_nan_power_of_two_is_named(tmp_path: Path) -> None:
    """255 in e8m0, in a matrix that is decoded at load."""
    write(tmp_path, MEMBER, ONE_FILE, **QUANTIZED_SIZES)
    give_scale(tmp_path, torch.full((4, 2), 255, dtype=U8).view(E8M0))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_names(caught, [PREFIX + Q, "255", "254"])


# --- scales beside weights that are not quantised ---------------------------------------------------

IDLE = {
    f"{PREFIX}layers.1.self_attn.k_proj.weight_scale_inv": torch.tensor([[-5.7e-10]]),
    f"{PREFIX}layers.0.linear_attn.in_proj_a.weight_scale_inv": torch.tensor([[math.nan, 3e25]]),
    f"{PREFIX}layers.0.mlp.gate.weight_scale": torch.full((8, 5), 126, dtype=U8),
    f"{PREFIX}layers.0.mlp.experts.down_proj_scale_inv": torch.full((8, 2, 2), 1e31),
    f"{PREFIX}layers.0.mlp.experts.gate_up_proj_scale_inv": torch.zeros(8, 3, 2),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "one by one"])
def test_a_scale_beside_a_plain_weight_is_not_applied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fused: bool
) -> None:
    """transformers writes what memory held; the weights are plain, and it is said what was left out."""
    write(tmp_path / "a", MEMBER, Dialect(fused_trunk=fused), **QUANTIZED_SIZES)
    write(tmp_path / "b", MEMBER, Dialect(fused_trunk=fused), **QUANTIZED_SIZES)
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update(IDLE))
    model, lines = loaded(tmp_path / "a")
    assert torch.equal(logits_of(model), logits_of(load(tmp_path / "b")))
    end = "(1 x): not applied, though it is not 1: the weight beside it is not quantised"
    assert f"layers.*.self_attn.k_proj.weight_scale_inv {end}" in lines
    assert f"layers.*.mlp.experts.down_proj_scale_inv {end}" in lines
    assert len(lines) == len(IDLE)
    status, out = inspected(tmp_path / "a", capsys)
    assert status == 1
    assert out.count("not applied, though it is not 1") == len(IDLE)
    assert "is not quantised, so it has no scales" in out
    convert(tmp_path / "a", tmp_path / "out", Options("mxfp4"))
    assert not [n for n in Checkpoint(tmp_path / "out").stored if n in IDLE]


@pytest.mark.parametrize(
    "one",
    [torch.ones(1, 2), torch.ones(()), torch.full((8, 5), 127, dtype=U8)],
    ids=["blocks", "scalar", "bytes"],
)
def test_a_scale_of_one_is_silent(tmp_path: Path, one: Tensor) -> None:
    """It would change nothing."""
    write(tmp_path, MEMBER, **QUANTIZED_SIZES)
    edit_tensors(tmp_path, lambda t: t.update({f"{PREFIX}layers.0.mlp.gate.weight_scale": one}))
    assert loaded(tmp_path)[1] == []
    assert len(Checkpoint(tmp_path).idle) == 1


@pytest.mark.parametrize("fused", [True, False], ids=["fused experts", "a matrix"])
def test_a_weight_that_was_cast_without_its_scale_is_refused(tmp_path: Path, fused: bool) -> None:
    """BF16 that holds nothing but e4m3 numbers: with its scale left out it is another model."""
    write(tmp_path, MEMBER, **QUANTIZED_SIZES)
    name = f"{LAYER}.down_proj" if fused else f"{PREFIX}layers.1.self_attn.k_proj.weight"
    scale = f"{name}_scale_inv"

    def cast(tensors: dict[str, Tensor]) -> None:
        tensors[name] = (tensors[name] * 300).to(torch.float8_e4m3fn).to(BF16)
        tensors[scale] = torch.full((8, 2, 2) if fused else (1, 2), 1 / 300)

    edit_tensors(tmp_path, cast)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_names(caught, [name, scale, "BF16", "e4m3"])


def test_some_experts_fp8_and_some_plain(tmp_path: Path) -> None:
    """transformers quantises gate and up and leaves down, whose sizes a block does not divide. A scale
    that serves one expert is not idle because of another."""
    expected = write_fused(tmp_path / "in", FUSED["blocks through gate and up"], "one by one")

    def plain(tensors: dict[str, Tensor]) -> None:
        for name in [
            name for name in tensors if name.endswith((".down_proj.weight", ".3.up_proj.weight"))
        ]:
            if ".experts." in name and name.startswith(PREFIX):
                bare = name.removeprefix(PREFIX)
                expected[bare] = rounded(expected[bare], BF16).float()
                tensors[name] = expected[bare].to(BF16)
        for i in range(2):
            tensors[f"{PREFIX}layers.{i}.mlp.experts.down_proj_scale_inv"].fill_(7.0)

    edit_tensors(tmp_path / "in", plain)
    write_plain(tmp_path / "plain", expected, BF16, SIZES)
    checkpoint = Checkpoint(tmp_path / "in")
    assert sorted(checkpoint.idle) == [
        f"{PREFIX}layers.{i}.mlp.experts.down_proj_scale_inv" for i in range(2)
    ]
    model, lines = loaded(tmp_path / "in")
    assert len(lines) == 1  # the idle scales
    assert torch.equal(logits_of(model), logits_of(load(tmp_path / "plain")))
    assert (tmp_path / "in" / SINGLE).exists()


@pytest.mark.parametrize(
    "shape", [(E, 0, D), (E, 1, D), (E, 384, 0), (0, 384, D), (E, 384)], ids=str
)
def test_fused_experts_of_no_size(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Header sizes that no model has."""
    write_fused(tmp_path, FUSED["blocks through gate and up"], "fused")
    empty = torch.zeros(shape).to(torch.float8_e4m3fn)
    edit_tensors(tmp_path, lambda t: t.update({f"{LAYER}.gate_up_proj": empty}))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_names(caught, [f"{LAYER}.gate_up_proj"])


def test_an_expert_with_more_digits_than_python_converts() -> None:
    """Its tensor is named, as any that has no scales."""
    stem, file = "model.layers.0.mlp.experts", Path("x.safetensors")
    names = f"{stem}.{'9' * 5000}.gate_proj.weight", f"{stem}.gate_up_proj_scale_inv"
    weight, scale = (
        Stored(name, file, dtype, shape, lambda: torch.empty(0))
        for name, dtype, shape in zip(
            names, (torch.float8_e4m3fn, torch.float32), ((128, 128), (2, 2, 1)), strict=True
        )
    )
    with pytest.raises(InputError, match="are left out"):
        entry_of(weight, {weight.name: weight, scale.name: scale}, (128, 128), 2)
