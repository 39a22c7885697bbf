"""`quantization_config` as clients write it: what it says is compared, what the tensors are decides."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35.errors import InputError
from qwen35.load import load
from tests.support.checkpoints import (
    EXPERTS,
    FP8_CHANNEL,
    FP8_CHANNEL_BF16,
    FP8_TENSOR,
    MIXERS,
    MXFP4,
    MXFP4_SHARED,
    QUANTIZED_SIZES,
    QWEN3_5_FP8,
    Dialect,
    assert_names,
    edit_json,
    edit_tensors,
    logits_of,
    write,
    write_plain,
)
from tests.support.dialects import cli
from tests.support.family import FAMILY
from tests.weights.test_dialects import rounded
from tools import inspect
from weights.checkpoint import Checkpoint
from weights.convert import convert
from weights.output import Options
from weights.quantization import EXCLUDED, METHODS, Quantization, compare

MEMBER = "397B-A17B"
SIZES = FAMILY[MEMBER] | QUANTIZED_SIZES
RUN = ("--prompt-ids", "5,6,7", "--max-new-tokens", 6, "--ignore-eos")
PREFIX = "model.language_model."

# The claims of compressed-tensors 0.20 for its presets FP8_DYNAMIC and MXFP4A16.
FP8_DYNAMIC = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "dynamic": True,
            },
            "format": "float-quantized",
        }
    },
    "ignore": [],
}
MXFP4A16 = FP8_DYNAMIC | {
    "format": "mxfp4-pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4, "type": "float", "group_size": 32, "strategy": "group",
                "scale_dtype": "torch.uint8",
            },
            "input_activations": None,
            "format": "mxfp4-pack-quantized",
        }
    },
}  # fmt: skip
PER_ROW = Dialect(
    fused_trunk=False,
    quantized=tuple((glob, FP8_CHANNEL_BF16) for glob in MIXERS)
    + tuple((glob, FP8_CHANNEL) for glob in EXPERTS),
)
PLAIN_PARTS = ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert", "re:.*in_proj_[ab]$", "re:^mtp"]


def claim_of(folder: Path, claim: Any) -> None:
    edit_json(folder / "config.json", quantization_config=claim)


def inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and text of `python -m tools.inspect`."""
    status = inspect.main(inspect.build_parser().parse_args([str(folder)]))
    return status, capsys.readouterr().out


def loaded(folder: Path) -> tuple[Any, list[str]]:
    """The model, and what loading warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(folder)
    return model, [str(warning.message).removeprefix(f"{folder}: ") for warning in caught]


# --- methods ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "shown"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method = 'bitsandbytes' "),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "quant_method = 'gptq' "),
        ({"quant_method": "awq"}, "quant_method = 'awq' "),
        ({"bits": 4}, "quant_method = 'None' "),
        ({"quant_method": ["fp8"]}, "['fp8']"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("dialect", [Dialect(), QWEN3_5_FP8], ids=["plain", "fp8"])
def test_another_method_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dialect: Dialect, claim: Any, shown: str
) -> None:
    """One warning that says that nothing is compared; the tensors are read by what they are."""
    expected = write(tmp_path / "claimed", MEMBER, dialect, **QUANTIZED_SIZES)
    claim_of(tmp_path / "claimed", claim)
    write_plain(tmp_path / "plain", expected, torch.bfloat16, SIZES)
    model, lines = loaded(tmp_path / "claimed")
    assert torch.equal(logits_of(model), logits_of(load(tmp_path / "plain")))
    (line,) = lines
    assert shown in line
    assert "not compared" in line
    status, out = inspected(tmp_path / "claimed", capsys)
    assert status == 1
    assert f"problem: {line}\n" in out


@pytest.mark.parametrize("method", METHODS)
def test_numbers_do_not_depend_on_the_method(tmp_path: Path, method: str) -> None:
    """FP8 a row: the same logits under every name, and no warning where the list is right."""
    expected = write(tmp_path / "claimed", MEMBER, PER_ROW, **QUANTIZED_SIZES)
    claim_of(tmp_path / "claimed", {"quant_method": method, "ignore": PLAIN_PARTS})
    write_plain(tmp_path / "plain", expected, torch.bfloat16, SIZES)
    model, lines = loaded(tmp_path / "claimed")
    assert lines == []
    assert torch.equal(logits_of(model), logits_of(load(tmp_path / "plain")))


def test_what_is_no_claim_at_all_is_one_line(tmp_path: Path) -> None:
    """A number, where an object is expected."""
    write(tmp_path, MEMBER)
    claim_of(tmp_path, 8)
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    assert_names(caught, [str(tmp_path / "config.json"), "quantization_config = 8", "object"])


# --- compressed-tensors -----------------------------------------------------------------------------


def test_fp8_of_compressed_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FP8_DYNAMIC: e4m3 with a scale a row, under its own claim with expressions in the list."""
    expected = write(tmp_path / "claimed", MEMBER, PER_ROW, **QUANTIZED_SIZES)
    claim_of(tmp_path / "claimed", FP8_DYNAMIC | {"ignore": PLAIN_PARTS})
    write_plain(tmp_path / "plain", expected, torch.bfloat16, SIZES)
    model, lines = loaded(tmp_path / "claimed")
    assert lines == []
    assert torch.equal(logits_of(model), logits_of(load(tmp_path / "plain")))
    status, out = inspected(tmp_path / "claimed", capsys)
    assert (status, out.count("note: ")) == (0, 0)
    assert "quantization_config: compressed-tensors" in out


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """MXFP4A16: `weight_packed` and `weight_scale`, both U8, the even element in the low nibble."""
    folder = tmp_path_factory.mktemp("packed")
    expected = write(folder, MEMBER, replace(MXFP4_SHARED, shards=1), **QUANTIZED_SIZES)

    def rename(tensors: dict[str, Tensor]) -> None:
        for scale in [name for name in tensors if name.endswith(".weight_scale")]:
            weight = scale.removesuffix("_scale")
            tensors[f"{weight}_packed"] = tensors.pop(weight)

    edit_tensors(folder, rename)
    plain = ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*attn", "re:^mtp"]
    claim_of(folder, MXFP4A16 | {"ignore": plain})
    return folder, expected


def test_mxfp4_of_compressed_tensors(
    packed: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parameters, logits, tokens and bytes; experts stay packed."""
    folder, expected = packed
    write_plain(tmp_path, expected, torch.bfloat16, SIZES)
    model, lines = loaded(folder)
    assert lines == []
    assert "(gate_proj): MXFP4Linear(160 -> 192)" in str(model)
    assert torch.equal(logits_of(model), logits_of(load(tmp_path)))
    entries = Checkpoint(folder).entries
    assert entries.keys() == expected.keys()
    for name, exact in expected.items():
        assert torch.equal(entries[name].read(torch.float64), exact.double()), name
    status, out = inspected(folder, capsys)
    assert (status, out.count("note: ")) == (0, 0)
    routed = next(line for line in out.splitlines() if line.startswith("routed experts"))
    assert "mxfp4" in routed
    status, out, err = cli(capsys, *RUN, "--model", folder)
    assert (status, err.count("warning")) == (0, 0)
    assert out == cli(capsys, *RUN, "--model", tmp_path)[1]


@pytest.mark.parametrize("to", ["bf16", "mxfp4"])
def test_packed_weights_are_converted(
    packed: tuple[Path, dict[str, Tensor]], tmp_path: Path, to: Any
) -> None:
    """They get AMD's names and keep their bytes, and more of the model is MXFP4. They are converted
    back to BF16, too."""
    folder, expected = packed
    convert(folder, tmp_path / "out", Options(to, what="all-linear"))
    converted = Checkpoint(tmp_path / "out")
    assert not [name for name in converted.stored if "packed" in name]
    assert (converted.problems, converted.notes) == ([], [])
    names = [name for name, tensor in expected.items() if tensor.dtype == torch.float64]
    assert names
    for name in names:
        entry = converted.entries[name]
        assert entry.format == ("plain" if to == "bf16" else "mxfp4")
        assert torch.equal(entry.read(torch.bfloat16), rounded(expected[name], torch.bfloat16))


def test_targets_say_what_is_quantised() -> None:
    """Modules by expression or name instead of a class: the rest is not claimed."""
    document = {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {"targets": ["re:.*mlp.experts.*"]},
                "group_1": {"targets": ["model.layers.0.self_attn.q_proj"]},
            },
            "ignore": ["re:.*experts.3.*"],
        }
    }
    claim = Quantization.from_config(document)
    assert claim is not None
    modules = {
        f"{PREFIX}layers.0.mlp.experts.2.up_proj": True,
        f"{PREFIX}layers.0.mlp.experts.3.up_proj": False,
        f"{PREFIX}layers.0.self_attn.q_proj": True,
        f"{PREFIX}layers.0.self_attn.k_proj": False,
    }
    assert {module: claim.claims(module) for module in modules} == modules


def test_the_size_of_blocks_of_compressed_tensors(tmp_path: Path) -> None:
    """It stands in a group's `block_structure`; without it the scales fit nothing."""
    dialect = replace(QWEN3_5_FP8, block=(32, 48))
    expected = write(tmp_path, MEMBER, dialect, **QUANTIZED_SIZES)
    group = {"targets": ["Linear"], "weights": {"strategy": "block", "block_structure": [32, 48]}}
    claim = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    claim_of(tmp_path, claim)
    name = "layers.1.self_attn.q_proj.weight"
    read = Checkpoint(tmp_path).entries[name].read(torch.float64)
    assert torch.equal(read, expected[name])
    claim_of(tmp_path, claim | {"config_groups": {}})
    with pytest.raises(InputError, match="128 x 128"):
        Checkpoint(tmp_path)


# --- formats that are not read ----------------------------------------------------------------------

Q = f"{PREFIX}layers.7.self_attn.q_proj"
U8, I32, F32 = torch.uint8, torch.int32, torch.float32
UNREAD: dict[str, tuple[dict[str, Tensor], list[str]]] = {
    "nvfp4 of compressed-tensors": (
        {
            f"{Q}.weight_packed": torch.ones(512, 32, dtype=U8),
            f"{Q}.weight_scale": torch.ones(512, 4).to(torch.float8_e4m3fn),
            f"{Q}.weight_global_scale": torch.ones(1),
        },
        [f"{Q}.weight_global_scale", "NVFP4"],
    ),
    "nvfp4 of modelopt": (
        {
            f"{Q}.weight": torch.ones(512, 32, dtype=U8),
            f"{Q}.weight_scale": torch.ones(512, 4).to(torch.float8_e4m3fn),
            f"{Q}.weight_scale_2": torch.ones(()),
        },
        [f"{Q}.weight_scale_2", "NVFP4"],
    ),
    "gptq": (
        {
            f"{Q}.qweight": torch.ones(8, 512, dtype=I32),
            f"{Q}.qzeros": torch.ones(1, 64, dtype=I32),
            f"{Q}.scales": torch.ones(1, 512),
            f"{Q}.g_idx": torch.ones(64, dtype=I32),
        },
        [f"{Q}.", "GPTQ"],
    ),
    "bitsandbytes": (
        {
            f"{Q}.weight": torch.ones(16384, 1, dtype=U8),
            f"{Q}.weight.absmax": torch.ones(512, dtype=U8),
            f"{Q}.weight.quant_map": torch.ones(16),
            f"{Q}.weight.quant_state.bitsandbytes__nf4": torch.ones(80, dtype=U8),
        },
        [f"{Q}.weight.absmax", "bitsandbytes"],
    ),
    "int4 of compressed-tensors": (
        {
            f"{Q}.weight_packed": torch.ones(512, 8, dtype=I32),
            f"{Q}.weight_scale": torch.ones(512, 1),
            f"{Q}.weight_shape": torch.tensor([512, 64]),
        },
        [f"{Q}.weight_shape", "packed integers"],
    ),
    "int8": ({f"{Q}.weight": torch.ones(512, 64, dtype=torch.int8)}, [f"{Q}.weight", "I8"]),
}


@pytest.mark.parametrize(("tensors", "words"), UNREAD.values(), ids=UNREAD.keys())
def test_a_format_that_is_not_read_is_named(
    tmp_path: Path, tensors: dict[str, Tensor], words: list[str]
) -> None:
    """The tensor and the format, in one line; whatever is claimed."""
    write(tmp_path, MEMBER)

    def change(stored: dict[str, Tensor]) -> None:
        del stored[f"{Q}.weight"]
        stored |= tensors

    edit_tensors(tmp_path, change)
    for claim in (None, {"quant_method": "modelopt"}, {"quant_method": "gptq"}):
        claim_of(tmp_path, claim)
        with pytest.raises(InputError) as caught:
            Checkpoint(tmp_path)
        assert_names(caught, words)


def test_mxfp4_with_other_scales_is_no_mxfp4(tmp_path: Path) -> None:
    """`weight_packed` with scales of another format, none of whose other tensors is there."""
    write(tmp_path, MEMBER)
    scale = torch.ones(512, 4).to(torch.float8_e4m3fn)
    packed = {f"{Q}.weight_packed": torch.ones(512, 32, dtype=U8), f"{Q}.weight_scale": scale}

    def change(stored: dict[str, Tensor]) -> None:
        del stored[f"{Q}.weight"]
        stored |= packed

    edit_tensors(tmp_path, change)
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    assert_names(caught, [f"{Q}.weight_scale", "F8_E4M3", f"{Q}.weight_packed", "[512, 2]", "U8"])


# --- lists and severity -----------------------------------------------------------------------------


@pytest.fixture
def fp8_folder(tmp_path: Path) -> tuple[Path, list[str]]:
    """An FP8 folder, and its list of what is plain."""
    write(tmp_path, MEMBER, QWEN3_5_FP8, **QUANTIZED_SIZES)
    document = json.loads((tmp_path / "config.json").read_text())
    return tmp_path, document["quantization_config"]["modules_to_not_convert"]


@pytest.mark.parametrize("method", ["fp8", "quark", "modelopt"])
@pytest.mark.parametrize("key", EXCLUDED)
def test_a_list_counts_under_every_key(
    fp8_folder: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], key: str, method: str
) -> None:
    """`ignored_layers` with fp8 (Quark's custom mode) as `modules_to_not_convert`."""
    folder, plain = fp8_folder
    claim_of(folder, {"quant_method": method, key: plain})
    assert loaded(folder)[1] == []
    status, out = inspected(folder, capsys)
    assert status == 0
    assert "note: " not in out


def test_lists_under_several_keys_are_united(fp8_folder: tuple[Path, list[str]]) -> None:
    """Half of it under one, half under another: neither is enough by itself."""
    folder, plain = fp8_folder
    first = {"quant_method": "fp8", "ignored_layers": plain[::2]}
    claim_of(folder, first)
    assert Checkpoint(folder).notes
    claim_of(folder, first | {"modules_to_not_convert": plain[1::2]})
    assert (Checkpoint(folder).problems, Checkpoint(folder).notes) == ([], [])


@pytest.mark.parametrize("key", EXCLUDED)
def test_a_list_that_is_none_is_one_line(tmp_path: Path, key: str) -> None:
    """The key and its value, whichever it stands under."""
    write(tmp_path, MEMBER)
    claim_of(tmp_path, {"quant_method": "fp8", key: "lm_head"})
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    assert_names(caught, [str(tmp_path / "config.json"), f"{key} = 'lm_head'", "list of names"])


def test_what_a_list_forgets_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quark leaves the router and fused experts alone and does not list them."""
    rows = (("*.self_attn.*_proj", FP8_TENSOR),)
    write(tmp_path, MEMBER, Dialect(claim="fp8", quantized=rows))
    rest = ["lm_head", "*linear_attn*", "*shared_expert*", "mtp.fc", "mtp.*mlp*"]
    claim_of(tmp_path, {"quant_method": "fp8", "ignored_layers": rest})
    assert loaded(tmp_path)[1] == []
    lines = sorted(Checkpoint(tmp_path).notes)
    reason = "not quantised, but quantization_config (fp8) does not exclude it"
    assert lines == [
        f"layers.*.mlp.experts.*.down_proj (192 x): {reason}",
        f"layers.*.mlp.experts.*.gate_proj (192 x): {reason}",
        f"layers.*.mlp.experts.*.up_proj (192 x): {reason}",
        f"layers.*.mlp.gate (8 x): {reason}",
    ]
    status, out = inspected(tmp_path, capsys)
    assert status == 0
    assert [line for line in out.splitlines() if line.startswith("note: ")] == [
        f"note: {line}" for line in lines
    ]
    assert "no problems" in out


def test_what_is_quantised_all_the_same_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other way round an engine that believes the list reads garbage."""
    write(tmp_path, MEMBER, MXFP4, **QUANTIZED_SIZES)
    document = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    claim_of(tmp_path, document | {"exclude": [*document["exclude"], "*experts.*.up_proj"]})
    status, out = inspected(tmp_path, capsys)
    assert status == 1
    reason = "mxfp4, but quantization_config (quark) excludes it"
    assert f"problem: layers.*.mlp.experts.*.up_proj (16 x): {reason}\n" in out


SEVERITY: list[tuple[Quantization | None, str, tuple[int, int]]] = [
    (None, "plain", (0, 0)),
    (None, "fp8", (1, 0)),
    (Quantization("fp8"), "plain", (1, 0)),  # nothing at all is as claimed
    (Quantization("fp8"), "fp8", (0, 0)),
    (Quantization("fp8"), "mxfp4", (0, 0)),
    (Quantization("fp8", ("a",)), "plain", (1, 0)),
    (Quantization("fp8", ("a",)), "fp8", (1, 0)),
    (Quantization("hqq", ("a",)), "fp8", (1, 0)),
    (Quantization("hqq"), "plain", (1, 0)),
]


@pytest.mark.parametrize(("claim", "found", "counts"), SEVERITY)
def test_problems_and_notes(
    claim: Quantization | None, found: str, counts: tuple[int, int]
) -> None:
    """The rule, case by case."""
    problems, notes = compare(claim, {"a": found})
    assert (len(problems), len(notes)) == counts
