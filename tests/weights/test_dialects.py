"""Quantised checkpoints: each dialect is the model of its decoded values, and a bad file is one line."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35.cli import run
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.generate import build_parser, main
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
    Packing,
    assert_names,
    edit_json,
    edit_tensors,
    logits_of,
    write,
    write_hole,
    write_plain,
)
from tests.support.family import FAMILY
from tests.support.memory import peak_anonymous_memory
from tests.weights.test_checkpoint import ROOT
from weights import entry as entry_module
from weights.checkpoint import Checkpoint
from weights.convert import convert
from weights.output import Options
from weights.quantization import Quantization, compare

MEMBER = "397B-A17B"
SIZES = FAMILY[MEMBER] | QUANTIZED_SIZES
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def repacked(dialect: Dialect, **packings: Packing) -> Dialect:
    """The dialect with other packings: `group` in the place of what serves a group, and so on."""
    changed = tuple((glob, packings.get(p.serves, p)) for glob, p in dialect.quantized)
    return replace(dialect, quantized=changed)


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


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    """A folder of each dialect, written once, and its parameters."""
    known: dict[Any, tuple[Path, dict[str, Tensor]]] = {}

    def folder(dialect: Dialect) -> tuple[Path, dict[str, Tensor]]:
        if dialect not in known:
            path = tmp_path_factory.mktemp("dialect")
            known[dialect] = path, write(path, MEMBER, dialect, **QUANTIZED_SIZES)
        return known[dialect]

    return folder


Written = Callable[..., tuple[Path, dict[str, Tensor]]]


@pytest.fixture
def copied(written: Written, tmp_path: Path) -> Callable[[Dialect], Path]:
    """A copy of a dialect's folder, in one file, to be damaged."""

    def copy(dialect: Dialect) -> Path:
        shutil.copytree(written(replace(dialect, shards=1))[0], tmp_path / "model")
        return tmp_path / "model"

    return copy


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as a reader has to give them: products are rounded to float32, then to bfloat16."""
    return exact.to(dtype) if dtype == torch.float64 else exact.float().to(dtype)


def quantised_linears(model: Model) -> dict[str, nn.Module]:
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, MXFP4Linear | FP8Linear)
    }


def quiet_load(folder: Path, dtype: torch.dtype | None = None) -> Model:
    """Load, and take a warning for an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(folder, dtype=dtype)


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
    """Without a model: names, shapes, formats and values, in each dtype and in the default one."""
    folder, expected = written(dialect)
    checkpoint = Checkpoint(folder)
    assert checkpoint.problems == []
    assert checkpoint.entries.keys() == expected.keys()
    for name, entry in checkpoint.entries.items():
        exact = expected[name]
        assert entry.shape == tuple(exact.shape)
        assert (entry.format != "plain") == (exact.dtype == torch.float64), name
        for dtype in DTYPES:
            assert torch.equal(entry.read(dtype), rounded(exact, dtype)), name
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
    """With and without drafts, quantised or decoded beforehand: the same tokens and logits."""
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


def cli(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """`python -m qwen35.generate` in this process: status, stdout, stderr."""
    with pytest.raises(SystemExit) as left:
        run(build_parser(), main, [str(argument) for argument in args])
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


RUN = ("--prompt-ids", "5,6,7", "--max-new-tokens", 6, "--ignore-eos")


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
    write(tmp_path, "35B-A3B", decoder_sparse_step=8, intermediate_size=96, mlp_only_layers=[])
    assert load(tmp_path).config.decoder_sparse_step == 8


def test_float16_beside_mxfp4_runs_in_bfloat16(tmp_path: Path) -> None:
    """The scales of MXFP4 reach further than float16."""
    write(tmp_path / "in", "35B-A3B", dtype=torch.float16)
    convert(tmp_path / "in", tmp_path / "out", Options("mxfp4"))
    model = load(tmp_path / "out")
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert logits_of(model).isfinite().all()


# --- bad tensors ----------------------------------------------------------------------------------

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]
PREFIX = "model.language_model."
EXPERT = f"{PREFIX}layers.1.mlp.experts.3.up_proj"  # [192, 160]
Q = f"{PREFIX}layers.1.self_attn.q_proj"  # [512, 160]
GATE = f"{PREFIX}layers.0.mlp.gate"
U8 = torch.uint8


def _set(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


BAD_MXFP4: dict[str, tuple[Change, list[str]]] = {
    "no scale": (
        lambda t: t.pop(f"{EXPERT}.weight_scale"),
        [f"{EXPERT}.weight ", "U8", "0 tensors of scales", f"{EXPERT}.weight_scale", "BF16"],
    ),
    "a scale without its weight": (
        lambda t: t.pop(f"{EXPERT}.weight"),
        [f"{EXPERT}.weight_scale has no {EXPERT}.weight"],
    ),
    "a scale of a module that is not there": (
        _set("model.language_model.layers.9.x.weight_scale", torch.ones(1, 1, dtype=U8)),
        ["layers.9.x.weight_scale has no", "layers.9.x.weight"],
    ),
    "both scales": (
        _set(f"{EXPERT}.weight_scale_inv", torch.ones(2, 2)),
        [f"{EXPERT}.weight ", "2 tensors of scales", "one is expected"],
    ),
    "too few groups": (
        _set(f"{EXPERT}.weight_scale", torch.ones(192, 4, dtype=U8)),
        [f"{EXPERT}.weight_scale", "[192, 4]", "[192, 5]"],
    ),
    "transposed scales": (
        _set(f"{EXPERT}.weight_scale", torch.ones(5, 192, dtype=U8)),
        [f"{EXPERT}.weight_scale", "[5, 192]", "[192, 5]"],
    ),
    "flat scales": (
        _set(f"{EXPERT}.weight_scale", torch.ones(960, dtype=U8)),
        [f"{EXPERT}.weight_scale", "[960]", "[192, 5]"],
    ),
    "float scales": (
        _set(f"{EXPERT}.weight_scale", torch.ones(192, 5)),
        [f"{EXPERT}.weight_scale", "F32", "U8"],
    ),
    "integer scales": (
        _set(f"{EXPERT}.weight_scale", torch.ones(192, 5, dtype=torch.int32)),
        [f"{EXPERT}.weight_scale", "I32", "U8"],
    ),
    "K is no multiple of 32": (
        lambda t: t.update({
            f"{EXPERT}.weight": torch.ones(192, 72, dtype=U8),
            f"{EXPERT}.weight_scale": torch.ones(192, 4, dtype=U8),
        }),
        [f"{EXPERT}.weight ", "[192, 72]", "[192, 4]"],
    ),
    "another K": (
        lambda t: t.update({
            f"{EXPERT}.weight": torch.ones(192, 64, dtype=U8),
            f"{EXPERT}.weight_scale": torch.ones(192, 4, dtype=U8),
        }),
        ["layers.1.mlp.experts.3.up_proj.weight", "[192, 128]", "[192, 160]"],
    ),
    "unpacked": (
        _set(f"{EXPERT}.weight", torch.ones(192, 160, dtype=U8)),
        [f"{EXPERT}.weight_scale", "[192, 5]", "[192, 10]"],
    ),
    "three axes": (
        _set(f"{EXPERT}.weight", torch.ones(2, 96, 80, dtype=U8)),
        [f"{EXPERT}.weight", "U8", "[2, 96, 80]", "two axes"],
    ),
    "fused": (
        lambda t: t.update({
            f"{PREFIX}layers.0.mlp.experts.gate_up_proj": torch.ones(8, 384, 80, dtype=U8)
        }),
        [f"{PREFIX}layers.0.mlp.experts.gate_up_proj", "U8", "BF16"],
    ),
    "bytes where nothing is quantised": (
        _set(f"{PREFIX}layers.0.linear_attn.A_log", torch.ones(8, dtype=U8)),
        [f"{PREFIX}layers.0.linear_attn.A_log", "U8", "F32"],
    ),
    "a norm in four bits": (
        lambda t: t.update({
            f"{PREFIX}norm.weight": torch.ones(80, dtype=U8),
            f"{PREFIX}norm.weight_scale": torch.ones(5, dtype=U8),
        }),
        [f"{PREFIX}norm.weight", "U8", "[80]", "two axes"],
    ),
    "weights of another integer": (
        _set(f"{EXPERT}.weight", torch.ones(192, 80, dtype=torch.int32)),
        [f"{EXPERT}.weight", "I32", "U8"],
    ),
    "signed bytes": (
        _set(f"{EXPERT}.weight", torch.ones(192, 80, dtype=torch.int8)),
        [f"{EXPERT}.weight", "I8", "U8"],
    ),
    "e8m0 for weights": (
        _set(f"{EXPERT}.weight", torch.ones(192, 80, dtype=U8).view(torch.float8_e8m0fnu)),
        [f"{EXPERT}.weight", "F8_E8M0", "U8"],
    ),
    "a NaN scale of a dense module": (
        lambda t: t[f"{PREFIX}layers.0.mlp.shared_expert.up_proj.weight_scale"][7].fill_(255),
        [f"{PREFIX}layers.0.mlp.shared_expert.up_proj.weight", "255", "254"],
    ),
}  # fmt: skip


def scale_of(change: Callable[[Tensor], object], name: str = f"{Q}.weight_scale_inv") -> Change:
    return lambda tensors: change(tensors[name])


BAD_FP8: dict[str, tuple[Change, list[str]]] = {
    "no scale": (
        lambda t: t.pop(f"{Q}.weight_scale_inv"),
        [f"{Q}.weight ", "F8_E4M3", "0 tensors of scales", f"{Q}.weight_scale_inv"],
    ),
    "a scale without its weight": (
        lambda t: t.pop(f"{Q}.weight"),
        [f"{Q}.weight_scale_inv has no {Q}.weight"],
    ),
    "both scales": (
        _set(f"{Q}.weight_scale", torch.ones(4, 2)),
        [f"{Q}.weight ", "2 tensors of scales"],
    ),
    "blocks missing": (
        _set(f"{Q}.weight_scale_inv", torch.ones(4, 1)),
        [f"{Q}.weight_scale_inv", "[4, 1]", "[512, 160]", "[4, 2]", "[512, 1]"],
    ),
    "channels missing": (
        _set(f"{Q}.weight_scale_inv", torch.ones(511, 1)),
        [f"{Q}.weight_scale_inv", "[511, 1]", "[512, 1]"],
    ),
    "a channel of the other axis": (
        _set(f"{Q}.weight_scale_inv", torch.ones(1, 160)),
        [f"{Q}.weight_scale_inv", "[1, 160]", "[512, 1]"],
    ),
    "three axes of scales": (
        _set(f"{Q}.weight_scale_inv", torch.ones(4, 2, 1)),
        [f"{Q}.weight_scale_inv", "[4, 2, 1]", "[4, 2]"],
    ),
    "integers for scales": (
        _set(f"{Q}.weight_scale_inv", torch.ones(4, 2, dtype=torch.int32)),
        [f"{Q}.weight_scale_inv", "I32", "BF16"],
    ),
    "FP8 for scales": (
        _set(f"{Q}.weight_scale_inv", torch.ones(4, 2).to(torch.float8_e4m3fn)),
        [f"{Q}.weight_scale_inv", "F8_E4M3", "F32"],
    ),
    "three axes": (
        _set(f"{Q}.weight", torch.ones(2, 256, 160).to(torch.float8_e4m3fn)),
        [f"{Q}.weight", "F8_E4M3", "[2, 256, 160]", "two axes"],
    ),
    "the other FP8": (
        _set(f"{Q}.weight", torch.ones(512, 160).to(torch.float8_e5m2)),
        [f"{Q}.weight", "F8_E5M2", "F8_E4M3"],
    ),
    "another shape": (
        _set(f"{Q}.weight", torch.ones(500, 160).to(torch.float8_e4m3fn)),
        ["layers.1.self_attn.q_proj.weight", "[500, 160]", "[512, 160]"],
    ),
    "a NaN scale": (scale_of(lambda s: s[3, 1].fill_(torch.nan)), [f"{Q}.weight", "finite"]),
    "an infinite scale": (scale_of(lambda s: s[0, 0].fill_(-torch.inf)), [f"{Q}.weight", "finite"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD_MXFP4.values(), ids=BAD_MXFP4.keys())
def test_bad_mxfp4_is_named(copied: Callable[..., Path], change: Change, words: list[str]) -> None:
    """At load: the tensor, and both values where there are two."""
    check_bad(copied(MXFP4_SHARED), change, words)


@pytest.mark.parametrize(("change", "words"), BAD_FP8.values(), ids=BAD_FP8.keys())
def test_bad_fp8_is_named(copied: Callable[..., Path], change: Change, words: list[str]) -> None:
    """At load: the tensor, and both values where there are two."""
    check_bad(copied(QWEN3_5_FP8), change, words)


def check_bad(folder: Path, change: Change, words: list[str]) -> None:
    """After `change`, loading is an error that holds the words."""
    edit_tensors(folder, change)
    with pytest.raises(InputError) as caught:
        load(folder)
    assert_names(caught, words)


def test_quantised_grouped_projections_that_the_heads_do_not_divide(copied: Any) -> None:
    """Qwen3-Next's packing is undone after decoding; the shape is checked before."""
    folder = copied(QWEN3_NEXT_FP8)
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    edit_tensors(
        folder,
        lambda t: t.update({
            name: torch.ones(385, 160).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(4, 2)
        }),
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        load(folder)
    assert_names(caught, [name, "[385, 160]"])


def _nan_byte(scale: Tensor) -> None:
    scale[5].fill_(255)


@pytest.mark.parametrize(
    ("dialect", "change", "words"),
    [
        (MXFP4, _nan_byte, ["255", "254"]),
        (repacked(MXFP4, group=FP4_E8M0), lambda s: _nan_byte(s.view(U8)), ["255", "254"]),
        (QWEN3_5_FP8, lambda s: s[1].fill_(torch.nan), ["finite"]),
        (QWEN3_5_FP8, lambda s: s[1].fill_(torch.inf), ["finite"]),
    ],
    ids=["mxfp4", "mxfp4 in e8m0", "fp8 nan", "fp8 inf"],
)
def test_an_experts_nan_scale_is_found_at_use(
    copied: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    dialect: Dialect,
    change: Callable[[Tensor], object],
    words: list[str],
) -> None:
    """Experts are not read at load; the run that hits one ends with status 2 and its name."""
    folder = copied(dialect)

    def damage(tensors: Tensors) -> None:
        for name in tensors:
            if ".layers.1.mlp.experts." in name and "up_proj.weight_scale" in name:
                change(tensors[name])

    edit_tensors(folder, damage)
    quiet_load(folder)
    status, out, err = cli(capsys, *RUN, "--model", folder)
    assert status == 2
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("python -m qwen35.generate: model.language_model.layers.1.mlp.experts.")
    assert not [word for word in ["up_proj.weight", *words] if word not in line], line
    assert err.count("\n") == 1


# --- bad claims -----------------------------------------------------------------------------------

BAD_CLAIMS: dict[str, tuple[Any, list[str]]] = {
    "a list": (["fp8"], ["quantization_config", "['fp8']"]),
    "a word": ("fp8", ["quantization_config", "'fp8'"]),
    "a number": (8, ["quantization_config", "8"]),
    "exclude is a word": (
        {"quant_method": "quark", "exclude": "lm_head"},
        ["exclude", "'lm_head'", "list"],
    ),
    "exclude is an object": (
        {"quant_method": "quark", "exclude": {"lm_head": True}},
        ["exclude", "lm_head", "list"],
    ),
    "exclude holds a number": (
        {"quant_method": "quark", "exclude": ["lm_head", 3]},
        ["exclude", "3", "list"],
    ),
    "the FP8 list is a word": (
        {"quant_method": "fp8", "modules_to_not_convert": "lm_head"},
        ["modules_to_not_convert", "'lm_head'", "list"],
    ),
} | {
    f"blocks {block!r}": (
        {"quant_method": "fp8", "weight_block_size": block},
        ["weight_block_size", repr(block), "[128, 128]"],
    )
    for block in (
        ["128", "128"], [128], [128, 128, 128], [128, 0], [128, -1], [128.0, 128.0], [True, True], 128,
        {"n": 1},
    )
}  # fmt: skip


@pytest.mark.parametrize(("claim", "words"), BAD_CLAIMS.values(), ids=BAD_CLAIMS.keys())
def test_a_bad_claim_is_one_line(
    written: Written, tmp_path: Path, claim: Any, words: list[str]
) -> None:
    """The file, the key, its value and what was expected."""
    folder, _ = written(QWEN3_5_FP8)
    shutil.copy(folder / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=claim)
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    assert_names(caught, [str(tmp_path / "config.json"), "quantization_config", *words])


def test_blocks_that_are_not_the_files(copied: Callable[..., Path]) -> None:
    """A wrong weight_block_size shows as scales of another shape."""
    folder = copied(QWEN3_5_FP8)
    claim = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=claim | {"weight_block_size": [64, 64]})
    with pytest.raises(InputError) as caught:
        load(folder)
    assert_names(caught, ["weight_scale_inv", "64 x 64"])
