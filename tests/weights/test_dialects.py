"""Quantised checkpoints: each dialect is the model of its decoded values, and a bad file is one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.generation import Generation
from qwen35.load import TINY, load
from qwen35.sampling import Sampling
from reference import quantized
from reference.model import Model
from reference.quantized import FP8Linear, MXFP4Linear
from tests.support.checkpoints import (
    FP4_E8M0,
    FP8,
    FP8_CHANNEL_BF16,
    FP8_TENSOR,
    MXFP4,
    MXFP4_ATTENTION,
    MXFP4_CHANNEL,
    MXFP4_MTP,
    MXFP4_SHARED,
    MXFP4_V2,
    QUANTIZED_SIZES,
    QWEN3_5,
    QWEN3_5_FP8,
    QWEN3_6,
    QWEN3_NEXT,
    QWEN3_NEXT_FP8,
    SINGLE,
    Dialect,
    edit_json,
    logits_of,
    write,
    write_hole,
    write_plain,
)
from tests.support.dialects import MEMBER, RUN, Written, cli, copied, quiet_load, repacked, written  # noqa: F401
from tests.support.family import FAMILY
from tests.support.memory import peak_anonymous_memory
from tests.weights.test_checkpoint import ROOT
from weights import entry as entry_module
from weights.checkpoint import Checkpoint
from weights.convert import convert
from weights.output import Options
from weights.quantization import Quantization, compare

SIZES = FAMILY[MEMBER] | QUANTIZED_SIZES


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


DIALECTS = {
    "fp8": QWEN3_5_FP8,
    "fp8, small blocks": replace(QWEN3_5_FP8, block=(32, 48)),
    "fp8, one scale a matrix": repacked(QWEN3_5_FP8, block=FP8_TENSOR),
    "fp8, fused prefix": replace(QWEN3_5_FP8, prefix="model.", nested=False, visual=False, shards=1),
    "qwen3-next fp8": QWEN3_NEXT_FP8,
    "mxfp4": MXFP4,
    "mxfp4, e8m0 scales": repacked(MXFP4, group=FP4_E8M0),
    "mxfp4, no mtp": replace(MXFP4, mtp=False),
    "mxfp4, one file": replace(MXFP4, shards=1),
    "mxfp4, shared expert too": MXFP4_SHARED,
    "mxfp4, mixers fp8": MXFP4_ATTENTION,
    "mxfp4, mixers fp8 with _inv scales": repacked(MXFP4_ATTENTION, block=FP8),
    "mxfp4, mixers fp8 a channel": MXFP4_CHANNEL,
    "mxfp4, mixers fp8 a channel in bf16": repacked(MXFP4_CHANNEL, channel=FP8_CHANNEL_BF16),
    "mxfp4, mtp experts too": MXFP4_MTP,
}  # fmt: skip


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as a reader has to give them: products are rounded to float32, then to bfloat16."""
    return exact.to(dtype) if dtype == torch.float64 else exact.float().to(dtype)


def quantised_linears(model: Model) -> dict[str, nn.Module]:
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, MXFP4Linear | FP8Linear)
    }


# --- what works -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())
def test_a_dialect_is_the_model_of_its_decoded_values(
    written: Written, tmp_path: Path, dialect: Dialect, dtype: torch.dtype
) -> None:
    """Dense parameters to the bit, experts as they lie in the file, and the logits of a plain folder."""
    folder, expected = written(dialect)
    model = quiet_load(folder, dtype)
    experts = quantised_linears(model)
    packed = {name for name, tensor in expected.items() if tensor.dtype == torch.float64}
    assert experts.keys() == {name for name in packed if ".experts." in name}
    assert len(packed) > len(experts) or "fp8" not in repr(dialect.quantized)
    different = [
        name
        for name, parameter in model.named_parameters()
        if name in expected
        and name not in experts
        and not torch.equal(parameter.to(dtype), rounded(expected[name], parameter.dtype).to(dtype))
    ]
    assert not different
    assert not expected.keys() - dict(model.named_parameters()).keys()
    write_plain(tmp_path, expected, dtype, SIZES)
    plain = quiet_load(tmp_path, dtype)
    assert not quantised_linears(plain)
    assert torch.equal(logits_of(model), logits_of(plain))
    assert (model.mtp is not None) == dialect.mtp


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())
def test_entries_are_the_parameters(written: Written, dialect: Dialect) -> None:
    """No model is built: names, shapes, formats and values are compared, in each dtype and in the
    default one."""
    folder, expected = written(dialect)
    checkpoint = Checkpoint(folder)
    assert checkpoint.problems == []
    assert checkpoint.entries.keys() == expected.keys()
    for name, entry in checkpoint.entries.items():
        exact = expected[name]
        assert entry.shape == tuple(exact.shape)
        assert (entry.format != "plain") == (exact.dtype == torch.float64), name
        for dtype in DTYPES:
            found = entry.read(dtype)
            assert found.dtype == dtype and torch.equal(found, rounded(exact, dtype)), name
        default = torch.bfloat16 if entry.format != "plain" else entry.dtype
        assert entry.read().dtype == default
        assert torch.equal(entry.read(), rounded(exact, default)), name


@pytest.mark.parametrize(
    ("dialect", "line"),
    [
        (MXFP4, "(gate_proj): MXFP4Linear(160 -> 192)"),
        (QWEN3_5_FP8, "(down_proj): FP8Linear(192 -> 160, a scale per block)"),
        (repacked(QWEN3_5_FP8, block=FP8_TENSOR), "FP8Linear(192 -> 160, a scale per tensor)"),
        (
            replace(MXFP4, quantized=(("layers.*.mlp.experts.*", FP8_CHANNEL_BF16),)),
            "FP8Linear(160 -> 192, a scale per channel)",
        ),
    ],
    ids=["mxfp4", "fp8", "fp8 a tensor", "fp8 a channel"],
)
def test_print_shows_what_experts_are(written: Written, dialect: Dialect, line: str) -> None:
    """`print(model)` says where four-bit weights are, and of which size."""
    folder, _ = written(dialect)
    model = quiet_load(folder)
    assert line in str(model)
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert ("(gate_proj): Linear(160 -> 192)" in str(model.mtp)) == (dialect.claim == "quark")


def test_the_claim_may_stand_in_the_text_config(written: Written, copied: Any) -> None:
    """quantization_config is at the top level in some repositories and in text_config in others."""
    dialect = replace(QWEN3_5_FP8, block=(32, 48), shards=1)
    folder, expected = copied(dialect), written(dialect)[1]
    document = json.loads((folder / "config.json").read_text())
    document["text_config"]["quantization_config"] = document.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(document))
    checkpoint = Checkpoint(folder)
    assert checkpoint.problems == []
    name = "layers.1.self_attn.q_proj.weight"
    assert torch.equal(checkpoint.entries[name].read(torch.float64), expected[name])


@pytest.mark.parametrize("dialect", [MXFP4_MTP, QWEN3_5_FP8], ids=["mxfp4", "fp8"])
def test_drafting_changes_nothing(written: Written, tmp_path: Path, dialect: Dialect) -> None:
    """Tokens and logits are the same with and without drafts, whether weights are quantised or
    decoded beforehand."""
    folder, expected = written(dialect)
    write_plain(tmp_path, expected, torch.bfloat16, SIZES)
    prompt = list(range(3, 70))

    def steps(model: Model, depth: int) -> list[tuple[int, Tensor]]:
        return list(Generation(model, prompt, 12, Sampling(), frozenset(), depth))

    runs = [steps(quiet_load(place), depth) for place in (folder, tmp_path) for depth in (0, 3)]
    assert len(runs[0]) == 12
    for other in runs[1:]:
        assert [token for token, _ in other] == [token for token, _ in runs[0]]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(other, runs[0], strict=True))


def test_the_command_line_drafts_with_a_quantised_model(
    written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`generate --json`: three drafts a round, the tokens of the decoded model, and no warning."""
    folder, expected = written(MXFP4_MTP)
    write_plain(tmp_path, expected, torch.bfloat16, SIZES)
    status, out, err = cli(capsys, *RUN, "--model", folder, "--json")
    assert status == 0, err
    assert "warning" not in err
    found = json.loads(out)
    assert len(found["draft"]["proposed"]) == 3
    _, plain, _ = cli(capsys, *RUN, "--model", tmp_path, "--json", "--draft-tokens", 0)
    assert found["token_ids"] == json.loads(plain)["token_ids"]


def test_the_embedded_model_is_plain_and_quiet() -> None:
    """The default model has no quantised module and no claim."""
    assert not quantised_linears(quiet_load(TINY))
    assert Checkpoint(TINY).problems == []


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", [MXFP4_MTP, QWEN3_5_FP8], ids=["mxfp4", "fp8"])
def test_only_experts_that_are_hit_are_decoded(
    written: Written, monkeypatch: pytest.MonkeyPatch, dialect: Dialect
) -> None:
    """None at load, top-k of them a layer for one token; all of them are views of the mapped file."""
    folder, expected = written(replace(dialect, shards=1))
    decode = entry_module.decode
    names: list[str] = []

    def counted(
        format: Any, weight: Tensor, scale: Tensor, dtype: Any, name: str, *rest: Any
    ) -> Tensor:
        names.append(name)
        return decode(format, weight, scale, dtype, name, *rest)

    monkeypatch.setattr(entry_module, "decode", counted)
    monkeypatch.setattr(quantized, "decode", counted)
    model = quiet_load(folder)
    packed = [name for name, tensor in expected.items() if tensor.dtype == torch.float64]
    assert len(names) == len([name for name in packed if ".experts." not in name])
    assert not [name for name in names if ".experts." in name]
    names.clear()
    logits_of(model, torch.tensor([[5]]))
    assert len(names) == len(set(names)) == 2 * 3 * 3  # layers, top-k, matrices of an expert
    experts = [p for n, p in model.named_parameters() if ".experts." in n]
    assert len({p.untyped_storage().data_ptr() for p in experts}) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("format", ["mxfp4", "fp8"])
def test_untouched_experts_are_never_read(tmp_path: Path, format: str) -> None:
    """8 GB of quantised experts open and generate in a fraction of that: zeros with scales of zero."""
    hidden, width = 2048, 2560
    sizes = FAMILY["35B-A3B"] | {
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "hidden_size": hidden,
        "num_experts": 512 if format == "mxfp4" else 256,
        "moe_intermediate_size": width,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with torch.device("meta"):
        model = Model(replace(Config.from_dict(sizes), mtp_num_hidden_layers=0))
    described: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        N, K, *_ = (*parameter.shape, 1)
        if ".experts." not in name:
            described[name] = "BF16", tuple(parameter.shape)
        elif format == "mxfp4":
            described[name] = "U8", (N, K // 2)
            described[f"{name}_scale"] = "U8", (N, K // 32)
        else:
            described[name] = "F8_E4M3", (N, K)
            described[f"{name}_scale_inv"] = "BF16", (-(-N // 128), -(-K // 128))
    assert write_hole(tmp_path / SINGLE, described) > 8e9
    command = [sys.executable, "-m", "qwen35.generate", "--model", str(tmp_path)]
    command += ["--prompt-ids", "1", "--max-new-tokens", "1", "--ignore-eos"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        peak = peak_anonymous_memory(process.pid, lambda: process.poll() is None)
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.split() == ["0"]  # all logits are equal: the lowest id
    assert err.count(f"{format}, but config.json has no quantization_config") == 3
    assert 0 < peak < 1.5 * 2**30


# --- claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", [QWEN3_5, QWEN3_6, QWEN3_NEXT], ids=["3.5", "3.6", "next"])
def test_a_plain_checkpoint_gives_no_warning(tmp_path: Path, dialect: Dialect) -> None:
    """Nothing is claimed and nothing is quantised."""
    write(tmp_path, "122B-A10B", dialect)
    quiet_load(tmp_path)


def warnings_of(folder: Path) -> list[str]:
    """The lines that `load` warns with, each of them one line that names the folder."""
    with pytest.warns(UserWarning) as caught:
        load(folder)
    lines = [str(warning.message) for warning in caught]
    assert all(line.startswith(f"{folder}: ") and "\n" not in line for line in lines)
    assert {warning.filename for warning in caught} == {__file__}  # the caller's line, not load's
    return [line.removeprefix(f"{folder}: ") for line in lines]


def test_a_plain_mtp_layer_that_is_claimed_is_reported(written: Written) -> None:
    """The list of a published repository forgets the MTP layer; what the tensors are, wins."""
    folder, expected = written(MXFP4_V2)
    reason = "not quantised, but quantization_config (quark) does not exclude it"
    assert sorted(Checkpoint(folder).notes) == sorted(
        [f"mtp.fc (1 x): {reason}"]
        + [f"mtp.layers.*.self_attn.{p}_proj (1 x): {reason}" for p in "qkvo"]
        + [f"mtp.layers.*.mlp.experts.*.{p}_proj (8 x): {reason}" for p in ("gate", "up", "down")]
        + [f"mtp.layers.*.mlp.shared_expert.{p}_proj (1 x): {reason}" for p in ("gate", "up", "down")]
    )  # fmt: skip
    model = quiet_load(folder, dtype=torch.float64)
    name = "layers.0.linear_attn.out_proj.weight"
    assert torch.equal(model.get_parameter(name), expected[name])


def test_quantised_modules_that_are_excluded_are_reported(copied: Callable[..., Path]) -> None:
    """Kind, how many, what they are, and whose list says otherwise."""
    folder = copied(MXFP4_SHARED)
    claim = json.loads((folder / "config.json").read_text())["quantization_config"]
    claim["exclude"] += ["*.experts.*.up_proj", "model.language_model.layers.1.mlp.shared_expert"]
    edit_json(folder / "config.json", quantization_config=claim)
    reason = "mxfp4, but quantization_config (quark) excludes it"
    assert sorted(warnings_of(folder)) == sorted(
        [f"layers.*.mlp.experts.*.up_proj (16 x): {reason}"]
        + [f"layers.*.mlp.shared_expert.{p}_proj (1 x): {reason}" for p in ("gate", "up", "down")]
    )


def test_quantised_modules_without_a_claim_are_reported(copied: Callable[..., Path]) -> None:
    """Somebody took the quantization_config out: the model is the same, and it is said."""
    folder = copied(QWEN3_5_FP8)
    edit_json(folder / "config.json", quantization_config=None)
    lines = warnings_of(folder)
    reason = "fp8, but config.json has no quantization_config"
    assert f"layers.*.mlp.experts.*.gate_proj (16 x): {reason}" in lines
    assert all(line.endswith(reason) for line in lines)


def test_a_claim_over_a_plain_checkpoint_is_reported(tmp_path: Path) -> None:
    """Left over by a tool that decoded the weights."""
    write(tmp_path, "0.8B")
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "fp8"})
    reason = "quantization_config (fp8) is there, but no tensor is quantised"
    assert warnings_of(tmp_path) == [reason]


def test_a_disagreement_is_one_line_on_the_command_line(
    written: Written, copied: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """No source line, no category: what is wrong, and then the tokens."""
    folder, _ = written(MXFP4_V2)
    status, out, err = cli(capsys, *RUN, "--model", folder)
    assert status == 0
    assert len(out.split()) == 6
    assert "warning" not in err  # its list names too little, which harms nobody
    notes = Checkpoint(folder).notes
    assert len(notes) == 11
    assert all(line.startswith("mtp.") and "does not exclude it" in line for line in notes)
    wrong = copied(MXFP4)
    edit_json(
        wrong / "config.json", quantization_config={"quant_method": "quark", "exclude": ["*"]}
    )
    status, out, err = cli(capsys, *RUN, "--model", wrong)
    assert (status, len(out.split())) == (0, 6)
    lines = [line for line in err.splitlines() if "warning" in line]
    assert len(lines) == 3
    assert all(
        line.startswith(f"python -m qwen35.generate: warning: {wrong}: layers.") for line in lines
    )


def test_a_long_list_is_looked_up_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's list has 2,275 names for 94,000 modules: only globs are held against each module."""
    compared: list[str] = []

    def counted(name: str, glob: str) -> bool:
        compared.append(glob)
        return fnmatchcase(name, glob)

    monkeypatch.setattr("weights.quantization.fnmatchcase", counted)
    plain = [f"mtp.layers.0.mlp.experts.{e}.up_proj" for e in range(200)]
    claim = Quantization("quark", (*plain, "*.gate"))
    formats = {f"layers.0.mlp.experts.{e}.up_proj": "mxfp4" for e in range(100)}
    assert compare(claim, formats | {plain[-1]: "plain"}) == ([], [])
    assert compared == ["*.gate"] * 100


def test_fused_experts_are_compared_one_by_one(tmp_path: Path) -> None:
    """A claim that does not exclude them speaks of fused BF16 experts too."""
    rest = ("lm_head", "*.linear_attn", "*.mlp.gate", "*.shared_expert*", "mtp")
    dialect = replace(
        QWEN3_5, claim="quark", excluded=rest, quantized=(("*.self_attn.*_proj", FP8_TENSOR),)
    )
    write(tmp_path, MEMBER, dialect, **QUANTIZED_SIZES)
    experts, layers = QUANTIZED_SIZES["num_experts"], QUANTIZED_SIZES["num_hidden_layers"]
    found = [note.split(":")[0] for note in Checkpoint(tmp_path).notes if ".experts." in note]
    assert sorted(found) == [
        f"layers.*.mlp.experts.*.{part}_proj ({experts * layers} x)"
        for part in ("down", "gate", "up")
    ]
    everything = {"quant_method": "quark", "exclude": [*rest, "re:model.*mlp.experts.*"]}
    edit_json(tmp_path / "config.json", quantization_config=everything)
    assert not [note for note in Checkpoint(tmp_path).notes if ".experts." in note]


def test_an_expression_of_the_list_that_cannot_be_read(tmp_path: Path) -> None:
    """One line that shows it."""
    write(tmp_path, MEMBER, MXFP4, **QUANTIZED_SIZES)
    claim = {"quant_method": "quark", "exclude": ["re:(unclosed"]}
    edit_json(tmp_path / "config.json", quantization_config=claim)
    with pytest.raises(InputError, match=r"unclosed"):
        Checkpoint(tmp_path)


def test_experts_in_some_layers_only(tmp_path: Path) -> None:
    """decoder_sparse_step and mlp_only_layers: a file has experts where the config says so."""
    write(tmp_path, "Qwen3-Next", decoder_sparse_step=8, intermediate_size=96, mlp_only_layers=[])
    assert load(tmp_path).config.decoder_sparse_step == 8


def test_float16_beside_mxfp4_runs_in_bfloat16(tmp_path: Path) -> None:
    """The scales of MXFP4 reach further than float16."""
    write(tmp_path / "in", "35B-A3B", dtype=torch.float16)
    convert(tmp_path / "in", tmp_path / "out", Options("mxfp4"))
    model = load(tmp_path / "out")
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert logits_of(model).isfinite().all()
