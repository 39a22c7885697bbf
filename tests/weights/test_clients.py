"""Folders as tools, transformers and people leave them: all that is there is read, or named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen35.errors import InputError
from qwen35.load import load
from reference.quantized import FP8Linear, MXFP4Linear
from tests.support.checkpoints import (
    MXFP4,
    QUANTIZED_SIZES,
    QWEN3_5_FP8,
    SINGLE,
    edit_json,
    edit_tensors,
    logits_of,
    write,
    write_plain,
)
from tests.support.family import FAMILY
from tools.inspect import describe, open_model
from weights.checkpoint import Checkpoint
from weights.convert import convert
from weights.output import Options

MEMBER = "397B-A17B"
SIZES = FAMILY[MEMBER] | QUANTIZED_SIZES
PREFIX = "model.language_model."
Tensors = dict[str, Tensor]
E4M3 = torch.float8_e4m3fn


def claim_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def same_model(folder: Path, plain: Path) -> None:
    """The logits of a folder are those of a plain folder of its decoded values, to the bit."""
    assert torch.equal(logits_of(load(folder)), logits_of(load(plain)))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An FP8 folder in one file, and a plain one of the same values."""
    folder, plain = tmp_path_factory.mktemp("fp8"), tmp_path_factory.mktemp("plain")
    expected = write(folder, MEMBER, replace(QWEN3_5_FP8, shards=1), **QUANTIZED_SIZES)
    write_plain(plain, expected, torch.bfloat16, SIZES)
    return folder, plain


@pytest.fixture(scope="module")
def fp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An MXFP4 folder in one file, and a plain one of the same values."""
    folder, plain = tmp_path_factory.mktemp("fp4"), tmp_path_factory.mktemp("plain4")
    expected = write(folder, MEMBER, replace(MXFP4, shards=1), **QUANTIZED_SIZES)
    write_plain(plain, expected, torch.bfloat16, SIZES)
    return folder, plain


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a folder with its tensors, and its claim, changed."""

    def copy(
        folder: Path, change: Callable[[Tensors], Any] = lambda t: None, claim: Any = 0
    ) -> Path:
        shutil.copytree(folder, tmp_path / "model")
        edit_tensors(tmp_path / "model", change)
        if claim != 0:
            edit_json(tmp_path / "model" / "config.json", quantization_config=claim)
        return tmp_path / "model"

    return copy


# --- claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", None, 5])
def test_plain_tensors_under_any_claim(tmp_path: Path, method: Any) -> None:
    """The claim is said to be wrong, and the tensors are what they are."""
    write(tmp_path / "a", "0.8B")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    claim = {"quant_method": method, "bits": 4}
    edit_json(tmp_path / "b" / "config.json", quantization_config=claim)
    with pytest.warns(UserWarning, match="quantization_config"):
        same_model(tmp_path / "b", tmp_path / "a")


CLAIMS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "block_structure": [128, 128]}}},
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]},
    "none": {},
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS.keys())
def test_fp8_under_other_claims(
    fp8: tuple[Path, Path], changed: Callable[..., Path], claim: dict[str, Any]
) -> None:
    folder = changed(fp8[0], claim=claim or None)
    if not claim:
        with pytest.warns(UserWarning, match="config.json has no quantization_config"):
            same_model(folder, fp8[1])
        return
    same_model(folder, fp8[1])
    found = describe(open_model(str(folder)))
    assert found["problems"] == []
    assert all("does not exclude it" in note for note in found["notes"])


def test_mxfp4_as_compressed_tensors_writes_it(
    fp4: tuple[Path, Path], changed: Callable[..., Path], tmp_path: Path
) -> None:
    """`weight_packed` with e8m0 bytes for scales: the same codes under another name."""

    def rename(tensors: Tensors) -> None:
        for name in [n for n in tensors if f"{n.removesuffix('.weight')}.weight_scale" in tensors]:
            tensors[name.replace(".weight", ".weight_packed")] = tensors.pop(name)

    claim = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "ignore": ["re:.*"],
    }
    folder = changed(
        fp4[0], rename, claim | {"ignore": ["lm_head", "re:.*(linear_attn|self_attn|mtp).*"]}
    )
    same_model(folder, fp4[1])
    assert sum(isinstance(m, MXFP4Linear) for m in load(folder).modules()) > 40
    convert(folder, tmp_path / "bf16", Options("bf16"))
    same_model(tmp_path / "bf16", fp4[1])
    assert not [name for name in Checkpoint(tmp_path / "bf16").stored if "packed" in name]


EXPERT = f"{PREFIX}layers.0.mlp.experts.0.up_proj"
U8 = torch.uint8
FOREIGN: dict[str, tuple[dict[str, Tensor], str]] = {
    "gptq": (
        {"qweight": torch.ones(8, 4, dtype=torch.int32), "qzeros": torch.ones(1, 4, dtype=torch.int32),
         "scales": torch.ones(1, 4), "g_idx": torch.ones(4, dtype=torch.int32)}, "GPTQ",
    ),
    "nvfp4": (
        {"weight_packed": torch.ones(192, 80, dtype=U8), "weight_scale": torch.ones(192, 10).to(E4M3),
         "weight_global_scale": torch.ones(1)}, "NVFP4",
    ),
    "bitsandbytes": (
        {"weight": torch.ones(192 * 80, 1, dtype=U8), "weight.absmax": torch.ones(480, dtype=U8)},
        "bitsandbytes",
    ),
    "zero points": (
        {"weight_packed": torch.ones(192, 20, dtype=torch.int32), "weight_scale": torch.ones(192, 5),
         "weight_zero_point": torch.ones(24, 5, dtype=torch.int32)}, "packed integers",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "format"), FOREIGN.values(), ids=FOREIGN.keys())
def test_formats_that_are_not_read_are_named(
    fp4: tuple[Path, Path], changed: Callable[..., Path], tensors: Tensors, format: str
) -> None:
    def swap(stored: Tensors) -> None:
        del stored[f"{EXPERT}.weight"], stored[f"{EXPERT}.weight_scale"]
        stored |= {f"{EXPERT}.{leaf}": tensor for leaf, tensor in tensors.items()}

    folder = changed(fp4[0], swap)
    with pytest.raises(
        InputError, match=rf"{EXPERT}\S* is in a format that is not read here: .*{format}"
    ):
        load(folder)


@pytest.mark.parametrize("key", ["ignored_layers", "exclude_modules", "ignore", "exclude"])
def test_the_list_has_many_names(
    fp8: tuple[Path, Path], changed: Callable[..., Path], key: str
) -> None:
    """All of them are read, and united."""
    claim = claim_of(fp8[0])
    names = claim.pop("modules_to_not_convert")
    half = len(names) // 2
    both = {key: names[:half], "modules_to_not_convert": names[half:]}
    found = describe(open_model(str(changed(fp8[0], claim=claim | both))))
    assert found["problems"] == found["notes"] == []


def test_a_list_that_says_too_little_is_a_note(
    fp8: tuple[Path, Path], changed: Callable[..., Path]
) -> None:
    """Quark forgets the router that it left alone; one that says too much would be a problem."""
    claim = claim_of(fp8[0])
    kept = [n for n in claim["modules_to_not_convert"] if not n.endswith(".mlp.gate")]
    folder = changed(fp8[0], claim=claim | {"modules_to_not_convert": kept})
    found = describe(open_model(str(folder)))
    assert found["problems"] == []
    assert any(note.startswith("layers.*.mlp.gate") for note in found["notes"])
    claim["modules_to_not_convert"].append(f"{PREFIX}layers.0")
    edit_json(folder / "config.json", quantization_config=claim)
    assert any("fp8, but" in problem for problem in describe(open_model(str(folder)))["problems"])


# --- scales for run time --------------------------------------------------------------------------

RUN_TIME = [
    "self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale", "self_attn.k_scale",
    "self_attn.v_scale", "self_attn.q_scale", "self_attn.prob_scale", "self_attn.q_proj.input_scale",
    "mlp.experts.0.up_proj.input_scale", "self_attn.o_proj.activation_scale",
    "self_attn.q_proj.input_global_scale", "self_attn.k_proj.k_scale",
]  # fmt: skip


@pytest.mark.parametrize("leaf", RUN_TIME)
def test_scales_for_run_time_are_put_aside(
    fp8: tuple[Path, Path], changed: Callable[..., Path], leaf: str
) -> None:
    """Calibrated scales of activations and of the KV cache: listed, kept by name, and not needed."""
    name = f"{PREFIX}layers.1.{leaf}"
    folder = changed(fp8[0], lambda t: t.update({name: torch.tensor([0.5])}))
    same_model(folder, fp8[1])
    found = describe(open_model(str(folder)))
    assert found["problems"] == []
    assert any("run time" in reason for reason in found["ignored"])
    assert Checkpoint(folder).stored[name].read().item() == 0.5
    edit_tensors(folder, lambda t: t.update({name: torch.ones(512, 160)}))
    with pytest.raises(InputError, match="not part of this model"):
        load(folder)


# --- FP8 as transformers saves it -----------------------------------------------------------------


def halves(tensors: Tensors, layer: str, leaf: str) -> tuple[Tensor, Tensor]:
    """Numbers or scales of all experts' gate-and-up and down projections, stacked."""
    experts = range(SIZES["num_experts"])

    def stacked(projection: str) -> Tensor:
        return torch.stack([tensors.pop(f"{layer}.{e}.{projection}.{leaf}") for e in experts])

    gate_up = torch.cat([stacked("gate_proj"), stacked("up_proj")], dim=1)
    return gate_up, stacked("down_proj")


def fuse(tensors: Tensors, *, weights: bool) -> None:
    """Scales of experts in one tensor a layer, and their numbers too."""
    for layer in sorted(
        {n.partition(".experts.")[0] + ".experts" for n in tensors if ".experts." in n}
    ):
        for name, scale in zip(
            ("gate_up", "down"), halves(tensors, layer, "weight_scale_inv"), strict=True
        ):
            tensors[f"{layer}.{name}_proj_scale_inv"] = scale.float()
        if weights:
            for name, both in zip(
                ("gate_up", "down"), halves(tensors, layer, "weight"), strict=True
            ):
                tensors[f"{layer}.{name}_proj"] = both


@pytest.mark.parametrize("weights", [False, True], ids=["scales", "scales and numbers"])
def test_fused_fp8_experts(
    fp8: tuple[Path, Path], changed: Callable[..., Path], tmp_path: Path, weights: bool
) -> None:
    """[E, 2I, D] with scales [E, blocks, blocks], where a block does not divide I; and conversions."""
    folder = changed(fp8[0], lambda t: fuse(t, weights=weights))
    same_model(folder, fp8[1])
    model = load(folder)
    experts = model.layers[0].mlp.experts
    assert all(
        isinstance(m, FP8Linear) for e in experts for m in (e.gate_proj, e.up_proj, e.down_proj)
    )
    assert describe(open_model(str(folder)))["problems"] == []
    convert(folder, tmp_path / "bf16", Options("bf16"))
    same_model(tmp_path / "bf16", fp8[1])
    for source, name in ((folder, "a"), (fp8[0], "b")):
        convert(source, tmp_path / name, Options("mxfp4"))
    assert torch.equal(logits_of(load(tmp_path / "a")), logits_of(load(tmp_path / "b")))


def test_a_block_that_reaches_over_both_halves(
    fp8: tuple[Path, Path], changed: Callable[..., Path], tmp_path: Path
) -> None:
    """ceil(2I / 128) rows of scales for 2 x 192 rows: the middle block serves gate and up."""

    def change(tensors: Tensors) -> None:
        fuse(tensors, weights=True)
        for name in [n for n in tensors if n.endswith("gate_up_proj_scale_inv")]:
            assert tensors[name].shape[1] == 4
            tensors[name] = tensors[name][:, :3].clone()

    folder = changed(fp8[0], change)
    tensors = load_file(folder / SINGLE)
    name = f"{PREFIX}layers.0.mlp.experts.gate_up_proj"
    scale = tensors[f"{name}_scale_inv"].repeat_interleave(128, 1).repeat_interleave(128, 2)
    exact = tensors[name].float() * scale[:, :384, :160]
    expert = load(folder, dtype=torch.float32).layers[0].mlp.experts[3]
    x = torch.randn(4, 160)
    assert torch.equal(expert.gate_proj(x), x @ exact[3, :192].T)
    assert torch.equal(expert.up_proj(x), x @ exact[3, 192:].T)


def test_a_scale_beside_a_matrix_that_was_left_alone(
    fp8: tuple[Path, Path], changed: Callable[..., Path]
) -> None:
    """transformers writes a placeholder, which it does not read either."""
    name = f"{PREFIX}layers.0.mlp.gate.weight_scale_inv"
    folder = changed(fp8[0], lambda t: t.update({name: torch.full((1, 2), 7.0)}))
    with pytest.warns(UserWarning, match="not applied, though it is not 1"):
        same_model(folder, fp8[1])
    reasons = describe(open_model(str(folder)))["ignored"]
    assert any("is not quantised, so it has no scales" in reason for reason in reasons)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8], ids=["E8M0", "U8"])
@pytest.mark.parametrize("per", ["block", "32"])
def test_fp8_with_powers_of_two_for_scales(
    fp8: tuple[Path, Path],
    changed: Callable[..., Path],
    tmp_path: Path,
    dtype: torch.dtype,
    per: str,
) -> None:
    """transformers' `scale_fmt: ue8m0`, and MXFP8: a scale for 32 of a row."""
    plain: Tensors = {}

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(".weight_scale_inv")]:
            weight = tensors[name.removesuffix("_scale_inv")]
            N, K = weight.shape
            shape = tensors[name].shape if per == "block" else (N, K // 32)
            bytes_ = torch.randint(117, 123, shape, dtype=torch.uint8)
            tensors[name] = bytes_.view(dtype)
            factor = 2.0 ** (bytes_.double() - 127)
            rows, columns = (128, 128) if per == "block" else (1, 32)
            spread = factor.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:N, :K]
            plain[name.removesuffix("_scale_inv")] = weight.double() * spread

    folder = changed(fp8[0], change)
    shutil.copytree(folder, tmp_path / "plain")

    def decoded(tensors: Tensors) -> None:
        for name, exact in plain.items():
            tensors[name] = exact.float().bfloat16()
            del tensors[f"{name}_scale_inv"]

    edit_tensors(tmp_path / "plain", decoded)
    edit_json(tmp_path / "plain" / "config.json", quantization_config=None)
    same_model(folder, tmp_path / "plain")
