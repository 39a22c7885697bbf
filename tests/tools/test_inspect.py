"""`tools.inspect` of a checkpoint, against sums over the tensors themselves."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen35.config import Config
from tests.support.checkpoints import (
    QUANTIZED_SIZES,
    QWEN3_5,
    QWEN3_5_FP8,
    QWEN3_6,
    QWEN3_NEXT,
    SINGLE,
    edit_json,
    edit_tensors,
    write,
)
from tests.support.family import FAMILY
from tools.inspect import describe, open_model
from weights.convert import convert
from weights.output import Options
from weights.shard import Plan

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python -m tools.inspect`."""
    run = [sys.executable, "-m", "tools.inspect", *arguments]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def bytes_of(document: dict[str, Any], part: str) -> int:
    """The bytes of a part, in all formats together."""
    return sum(row["bytes"] for row in document["parts"] if row["part"] == part)


def test_the_published_397b_from_its_config_alone(tmp_path: Path) -> None:
    """The model's fact sheet: counts, active parameters, state and KV bytes; written out by hand."""
    text = {**FAMILY["397B-A17B"]}
    text |= {
        "vocab_size": 248320, "hidden_size": 4096, "num_hidden_layers": 60, "head_dim": 256,
        "num_attention_heads": 32, "num_key_value_heads": 2, "linear_num_key_heads": 16,
        "linear_num_value_heads": 64, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_5_moe", "text_config": text})
    )
    document = describe(open_model(str(tmp_path)))
    counts = {name: round(count / 1e9, 2) for name, count in document["parameters"].items()}
    assert counts["trunk"] == 396.35
    assert counts["routed_experts"] == 386.55
    assert counts["mtp"] == 6.60
    assert counts["embedding"] == counts["head"] == 1.02
    assert round(counts["active"], 1) == 15.3
    assert round(counts["active_with_head"], 1) == 16.3
    whole, *_, eighth = document["ranks"]
    assert whole["recurrent_state_bytes"] == 45 * 4 * 2**20
    assert whole["conv_state_bytes"] == 45 * 3 * 12288 * 2
    assert whole["kv_bytes_per_token"] == 30720
    assert whole["mtp_kv_bytes_per_token"] == 2048
    assert eighth["recurrent_state_bytes"] == whole["recurrent_state_bytes"] // 8
    assert eighth["kv_bytes_per_token"] == 30720 // 2  # two KV heads: one for four ranks
    assert document["problems"] == []


def test_settings_of_a_folder_without_weights(tmp_path: Path) -> None:
    """Ends and advice of all its files, and what config.json says twice."""
    document = {
        "model_type": "qwen3_5_moe",
        "text_config": FAMILY["397B-A17B"],
        "hidden_act": "gelu",
    }
    (tmp_path / "config.json").write_text(json.dumps(document))
    edit_json(tmp_path / "generation_config.json", eos_token_id=[7, 999], do_sample=True, top_k=20)
    added = {"9": {"content": "<|im_end|>"}}
    edit_json(
        tmp_path / "tokenizer_config.json", eos_token="<|im_end|>", added_tokens_decoder=added
    )
    found = describe(open_model(str(tmp_path)))
    assert found["stop_ids"] == {"7": ["generation_config.json"], "9": ["tokenizer_config.json"]}
    assert found["sampling"]["top_k"] == 20
    act, end = found["problems"]
    assert "hidden_act is 'silu' by default and 'gelu' in the top level" in act
    assert "eos_token_id 999 in generation_config.json" in end


def test_settings_that_cannot_be_read_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FAMILY["397B-A17B"]))
    edit_json(tmp_path / "generation_config.json", do_sample=True, top_p=5)
    status, out, err = command(str(tmp_path))
    assert (status, err) == (1, "")
    assert "generation_config.json: top_p = 5.0; expected a number in (0, 1]" in out


def test_a_published_size_by_its_name() -> None:
    """The same as a folder with its config.json."""
    document = describe(open_model("0.8B"))
    assert document["names"] == {}
    assert round(document["parameters"]["trunk"] / 1e9, 2) == 0.75
    assert document["parameters"]["head"] == 0  # tied


@pytest.mark.parametrize(
    ("dialect", "names"),
    [
        (QWEN3_5, ("model.language_model.", "fused", "one by one", "separate")),
        (QWEN3_6, ("model.language_model.", "fused", "fused", "separate")),
        (QWEN3_NEXT, ("model.", "one by one", "one by one", "grouped")),
        (replace(QWEN3_5, mtp=False), ("model.language_model.", "fused", None, "separate")),
    ],
    ids=["3.5", "3.6", "3-next", "without mtp"],
)
def test_names_and_bytes_of_a_folder(tmp_path: Path, dialect: Any, names: tuple[Any, ...]) -> None:
    """How experts and projections are stored; every byte of the files counted once."""
    member = "Qwen3-Next" if dialect is QWEN3_NEXT else "35B-A3B"
    write(tmp_path, member, dialect)
    document = describe(open_model(str(tmp_path)))
    keys = ("prefix", "experts", "mtp_experts", "delta_projections")
    assert tuple(document["names"][key] for key in keys) == names
    assert document["names"]["files"] == dialect.shards
    files = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    stored = [tensor for file in files for tensor in file.values()]
    assert document["names"]["tensors"] == len(stored)
    counted = sum(row["bytes"] for row in document["parts"]) + document["names"]["vision_bytes"]
    assert counted == sum(tensor.nbytes for tensor in stored)
    assert document["problems"] == []


def test_bytes_of_a_quantised_folder(tmp_path: Path) -> None:
    """4.25 bits for an element of MXFP4, its share of the scales with it."""
    write(tmp_path / "bf16", "35B-A3B")
    convert(tmp_path / "bf16", tmp_path / "mxfp4", Options("mxfp4"))
    before, after = (describe(open_model(str(tmp_path / name))) for name in ("bf16", "mxfp4"))
    routed = before["parameters"]["routed_experts"]
    assert bytes_of(before, "routed experts") == 2 * routed
    assert bytes_of(after, "routed experts") == routed * 17 // 32
    assert [row["format"] for row in after["parts"] if row["part"] == "routed experts"] == ["mxfp4"]
    assert bytes_of(before, "attention") == bytes_of(after, "attention")
    assert after["names"]["quantization"] == "quark"
    assert before["parameters"] == after["parameters"]


def test_ranks_hold_what_the_plan_gives_them(tmp_path: Path) -> None:
    """Weights a rank, summed plainly; a size that does not divide is named."""
    write(tmp_path, "35B-A3B", replace(QWEN3_5, visual=False))
    document = describe(open_model(str(tmp_path)))
    config = Config.from_file(tmp_path / "config.json")
    for row in document["ranks"]:
        if "problem" in row:
            assert f"tensor-parallel size {row['tp']}" in row["problem"]
            continue
        plan = Plan(config, row["tp"])
        held = 0
        for name, tensor in load_file(tmp_path / SINGLE).items():
            shard = plan.shard(name, tensor.shape, 0)
            held += shard.cut(tensor).nbytes
        assert row["weight_bytes"] == held
    assert any("problem" not in row for row in document["ranks"][1:])


def test_groups_of_32_that_a_rank_would_split_are_named(tmp_path: Path) -> None:
    """An intermediate of 32 is one group: it cannot be cut."""
    write(tmp_path / "bf16", "35B-A3B", moe_intermediate_size=32)
    convert(tmp_path / "bf16", tmp_path / "mxfp4", Options("mxfp4"))
    two = describe(open_model(str(tmp_path / "mxfp4")))["ranks"][1]
    assert "down_proj" in two["problem"]
    assert "32" in two["problem"]


def test_blocks_of_fp8_that_a_rank_would_split_are_named(tmp_path: Path) -> None:
    """192 rows at two ranks: 96 each, less than a block of 128."""
    write(tmp_path, "397B-A17B", QWEN3_5_FP8, **QUANTIZED_SIZES)
    one, two, *_ = describe(open_model(str(tmp_path)))["ranks"]
    assert "problem" not in one
    assert "128" in two["problem"]
    assert "fp8" in two["problem"]


def test_problems_make_it_exit_1(tmp_path: Path) -> None:
    """A tensor too few, and formats that are not as claimed; on stdout, as the rest."""
    write(tmp_path, "35B-A3B")
    edit_tensors(tmp_path, lambda t: t.pop("mtp.fc.weight"))
    claim = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    edit_json(tmp_path / "config.json", quantization_config=claim)
    status, out, err = command(str(tmp_path), "--json")
    assert status == 1
    assert err == ""
    problems = json.loads(out)["problems"]
    assert any("mtp.fc.weight" in problem for problem in problems)
    assert any("fp8" in problem and "no tensor is quantised" in problem for problem in problems)
    status, out, _ = command(str(tmp_path))
    assert status == 1
    assert out.count("problem: ") == len(problems)


def test_the_embedded_model_for_people() -> None:
    """Every part once, every rank, and an end that says that nothing is wrong."""
    status, out, err = command("tiny")
    assert status == 0
    assert err == ""
    for words in ("top 2 of 32", "routed experts", "no problems", "num_attention_heads = 4"):
        assert words in out


def test_nothing_but_headers_is_read(tmp_path: Path) -> None:
    """The bytes of the tensors may all be holes, and their sizes beyond any memory."""
    config = {**FAMILY["0.8B"], "vocab_size": 2**33 // 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = [config["vocab_size"], config["hidden_size"]]
    nbytes = 2 * math.prod(shape)
    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [0, nbytes]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    document = describe(open_model(str(tmp_path)))
    assert bytes_of(document, "embedding") == nbytes
    assert "missing" in document["problems"][0]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("13B", ["13B", "397B-A17B"]),
        ("/nowhere/at/all", ["/nowhere/at/all: no such folder"]),
        (__file__, [f"{__file__}: is a file, no folder"]),
        ("", ["model = ''; expected 'tiny', a folder"]),
    ],
)
def test_an_unknown_model_is_one_line(model: str, words: list[str]) -> None:
    """Neither a folder, nor a hub id, nor a size."""
    status, out, err = command(model)
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words)


def test_a_model_may_be_named_by_the_option() -> None:
    """`--model tiny` was two models, tiny and None."""
    assert command("--model", "tiny") == command("tiny")


def test_dtypes_are_counted_apart(tmp_path: Path) -> None:
    """F32 beside BF16 in one part gives two rows."""
    write(tmp_path, "35B-A3B", dtype=torch.float16)
    rows = describe(open_model(str(tmp_path)))["parts"]
    assert {row["format"] for row in rows if row["part"] == "delta nets"} == {"F16", "F32"}
