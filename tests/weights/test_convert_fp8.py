"""`tools.convert --to fp8`: the published FP8 dialect; and MXFP4's claim about activations."""

import json
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen35.errors import InputError
from qwen35.load import TINY, load
from reference.quantized import FP8Linear
from tests.support.checkpoints import (
    FP8_CHANNEL,
    MXFP4,
    QUANTIZED_SIZES,
    QWEN3_5,
    QWEN3_5_FP8,
    QWEN3_NEXT,
    Dialect,
    logits_of,
    write,
    write_plain,
)
from tests.support.conversions import assert_same, tensors_of
from tests.support.family import FAMILY
from tools.convert import check
from tools.inspect import describe, open_model
from weights import fp8
from weights.checkpoint import Checkpoint
from weights.convert import convert
from weights.output import Options

MEMBER = "397B-A17B"
ROOT = Path(__file__).parents[2]
TO_FP8 = Options("fp8", "all-linear")
PLAIN = ("*norm*", "*.conv1d", "*.in_proj_a", "*.in_proj_b", "*.in_proj_ba", "*.A_log",
         "*.dt_bias", "*.mlp.gate", "*.shared_expert_gate", "mtp.fc", "lm_head",
         "embed_tokens", "*visual*")  # fmt: skip


def source(folder: Path, dialect: Dialect = QWEN3_5) -> dict[str, Tensor]:
    sizes = {} if dialect == QWEN3_NEXT else QUANTIZED_SIZES
    return write(folder, "Qwen3-Next" if dialect == QWEN3_NEXT else MEMBER, dialect, **sizes)


@pytest.mark.parametrize("dialect", [QWEN3_5, QWEN3_NEXT, MXFP4], ids=["fused", "next", "mxfp4"])
def test_the_published_dialect(tmp_path: Path, dialect: Dialect) -> None:
    """Which matrices are FP8, their blocks and scales, the claim, and a clean inspection."""
    source(tmp_path / "in", dialect)
    convert(tmp_path / "in", tmp_path / "out", TO_FP8, check=check)
    out = Checkpoint(tmp_path / "out")
    claim = out.document["quantization_config"]
    assert claim == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128], "modules_to_not_convert": claim["modules_to_not_convert"],
    }  # fmt: skip
    for name, entry in out.entries.items():
        module = name.removesuffix(".weight")
        is_plain = any(fnmatchcase(module, pattern) for pattern in PLAIN)
        assert (entry.format == "plain") == is_plain, name
        if not is_plain:
            assert entry.stored_as.endswith(".weight")
            assert entry.scale is not None
            assert entry.scale.name == f"{entry.stored_as}_scale_inv"
            assert (entry.scale.dtype, entry.block) == (torch.bfloat16, (128, 128))
    assert not any(".gate_up_proj" in name for name in out.stored)
    found = describe(open_model(str(tmp_path / "out")))
    assert found["problems"] == found["notes"] == []


def test_numbers_and_report(tmp_path: Path) -> None:
    """Each matrix is quantised as `weights/fp8.py` says; the report has the error of each kind."""
    expected = source(tmp_path / "in")
    report = convert(tmp_path / "in", tmp_path / "out", TO_FP8)
    out = Checkpoint(tmp_path / "out")
    squares: dict[str, list[float]] = {}
    for name, exact in expected.items():
        entry = out.entries[name]
        if entry.format == "plain":
            assert torch.equal(entry.read(torch.float32), exact)
            continue
        numbers, scales = fp8.quantize_blocks(exact)
        stored = (entry.weight.read(), entry.scale.read() if entry.scale else None)
        assert torch.equal(stored[0].view(torch.uint8), numbers.view(torch.uint8)), name
        assert stored[1] is not None and torch.equal(stored[1], scales)
        lost = (entry.read(torch.float32) - exact).double().square().sum()
        if fnmatchcase(name, "layers.*.self_attn.q_proj.weight"):
            squares.setdefault("q", []).append(float(lost / exact.double().square().sum()))
    said = report["errors"]["layers.*.self_attn.q_proj.weight"]
    assert said["relative_rms"] == pytest.approx(squares["q"][0] ** 0.5, rel=1e-6)
    assert 0.01 < said["relative_rms"] < 0.04 < said["worst_group"] * 2


def test_it_loads_runs_and_goes_back(tmp_path: Path) -> None:
    """Experts stay FP8 in memory; `--to bf16` gives the decoded values; a second time copies."""
    source(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "fp8", TO_FP8)
    model = load(tmp_path / "fp8")
    assert all(isinstance(e.up_proj, FP8Linear) for e in model.layers[0].mlp.experts)
    convert(tmp_path / "fp8", tmp_path / "bf16", Options("bf16"))
    assert torch.equal(logits_of(load(tmp_path / "bf16")), logits_of(model))
    convert(tmp_path / "fp8", tmp_path / "fp4", Options("mxfp4"))
    assert load(tmp_path / "fp4").mtp is not None
    again = convert(tmp_path / "fp8", tmp_path / "again", TO_FP8)
    assert again["errors"] == {}
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "fp8"))


def test_what_is_fp8_already_is_copied_or_made_anew(tmp_path: Path) -> None:
    """Blocks of 128 x 128 keep their bytes; a scale a row becomes a scale a block."""
    experts = tuple(pair for pair in QWEN3_5_FP8.quantized if ".experts." in pair[0])
    rows = (("*.self_attn.*_proj", FP8_CHANNEL),)
    source(tmp_path / "in", replace(QWEN3_5_FP8, quantized=experts + rows, shards=1))
    convert(tmp_path / "in", tmp_path / "out", TO_FP8)
    before, after = Checkpoint(tmp_path / "in"), Checkpoint(tmp_path / "out")
    copied = "layers.0.mlp.experts.3.up_proj.weight"
    for tensor in (before.entries[copied], after.entries[copied]):
        assert tensor.scale is not None
    pairs = [
        (c.entries[copied].weight.read(), c.entries[copied].scale.read()) for c in (before, after)
    ]  # type: ignore[union-attr]
    assert torch.equal(pairs[0][0].view(torch.uint8), pairs[1][0].view(torch.uint8))
    assert torch.equal(pairs[0][1], pairs[1][1])
    anew = "layers.1.self_attn.q_proj.weight"
    exact = before.entries[anew].read(torch.float32)
    assert before.entries[anew].scale_block is None
    assert after.entries[anew].scale_block == (128, 128)
    numbers, scales = fp8.quantize_blocks(exact)
    assert torch.equal(
        after.entries[anew].read(torch.float32), fp8.dequantize(numbers, scales, torch.float32)
    )


def test_ranks_are_cut_at_the_edges_of_blocks(tmp_path: Path) -> None:
    """Two ranks' parts are the whole's; a cut inside of a block is refused in one line."""
    sizes = QUANTIZED_SIZES | {
        "hidden_size": 128, "head_dim": 64, "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    }  # fmt: skip
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "linear_num_key_heads": 4,
              "linear_num_value_heads": 8}  # fmt: skip
    write(tmp_path / "in", MEMBER, **sizes)
    convert(tmp_path / "in", tmp_path / "whole", TO_FP8)
    convert(tmp_path / "in", tmp_path / "ranks", replace(TO_FP8, tp=2))
    ranks = [
        {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
        for folder in sorted((tmp_path / "ranks").glob("rank-*"))
    ]
    whole = {
        k: v
        for f in sorted((tmp_path / "whole").glob("*.safetensors"))
        for k, v in load_file(f).items()
    }
    name = "model.language_model.layers.0.mlp.experts.2.up_proj.weight"
    for tensor in (name, f"{name}_scale_inv"):
        joined = torch.cat([rank[tensor].float() for rank in ranks])
        assert torch.equal(joined, whole[tensor].float())
    source(tmp_path / "odd")
    with pytest.raises(
        InputError, match=r"_scale_inv \(fp8\): the range .* is not a multiple of 128"
    ):
        convert(tmp_path / "odd", tmp_path / "none", replace(TO_FP8, tp=2))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float) -> None:
    expected = source(tmp_path / "in")
    name = "layers.0.mlp.experts.2.up_proj.weight"
    expected[name][3, 5] = value
    write_plain(tmp_path / "in", expected, torch.bfloat16, FAMILY[MEMBER] | QUANTIZED_SIZES)
    with pytest.raises(InputError, match="holds an infinity or a NaN"):
        convert(tmp_path / "in", tmp_path / "out", TO_FP8)
    assert not (tmp_path / "out").exists()


def test_a_killed_conversion_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    """Files are small, so that there are many; one is taken away as if it had not been written yet."""
    source(tmp_path / "in")
    small = replace(TO_FP8, shard_bytes=100_000)
    convert(tmp_path / "in", tmp_path / "whole", small)

    class Killed(BaseException):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        convert(tmp_path / "in", tmp_path / "out", small, progress=stop)
    with pytest.raises(InputError, match="unfinished conversion"):
        Checkpoint(tmp_path / "out")
    convert(tmp_path / "in", tmp_path / "out", small)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_claim_of_weights_alone(tmp_path: Path) -> None:
    """W4A16: no activations in the claim; the weights are the same as under AMD's."""
    source(tmp_path / "in")
    claims = {}
    for activations in ("mxfp4", "bf16"):
        target = tmp_path / activations
        convert(tmp_path / "in", target, Options("mxfp4", activations=activations))  # type: ignore[arg-type]
        claims[activations] = json.loads((target / "config.json").read_text())[
            "quantization_config"
        ]
    inputs = {name: claim["global_quant_config"]["input_tensors"] for name, claim in claims.items()}
    assert inputs["mxfp4"]["dtype"] == "fp4"
    assert inputs["bf16"] is None
    assert torch.equal(logits_of(load(tmp_path / "mxfp4")), logits_of(load(tmp_path / "bf16")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--to", "fp8", "--activations", "bf16"],
            "--activations bf16 goes with --to mxfp4, not fp8",
        ),
        (["--to", "bf16", "--what", "experts"], "--what experts goes with --to mxfp4 or fp8"),
        (["--to", "fp16"], "invalid choice: 'fp16'"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: list[str], words: str) -> None:
    command = [sys.executable, "-m", "tools.convert", str(TINY), str(tmp_path / "out"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_embedded_model_in_fp8(tmp_path: Path) -> None:
    """The command line converts it. A matrix smaller than a block has one scale."""
    command = [sys.executable, "-m", "tools.convert", "tiny", str(tmp_path / "out"), "--to", "fp8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert describe(open_model(str(tmp_path / "out")))["problems"] == []
    model = load(tmp_path / "out")
    assert model.layers[0].mlp.experts[0].up_proj.weight_scale.shape == (1, 2)
