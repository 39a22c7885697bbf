"""`tools.convert --verify` and `--dry-run`: what is there, and what would be, against what is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qwen35.errors import InputError
from tests.support.checkpoints import edit_json, edit_tensors, write
from tests.support.conversions import (  # noqa: F401
    LITTLE,
    MEMBER,
    U8,
    cli,
    contents,
    little,
    stop_at,
    tensors_of,
    untouched,
)
from tools.convert import check
from tools.inspect import describe, open_model
from weights import convert as conversion
from weights.convert import UNFINISHED, convert
from weights.output import Options
from weights.ranks import REPORT
from weights.verify import verify

TARGETS = (["--to", "mxfp4"], ["--to", "fp8"], ["--to", "bf16", "--tp", 2])


# --- plans that hold


@pytest.mark.parametrize("size", [32, 64])
def test_what_inspect_lists_is_what_convert_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    """Each target at each number of ranks, for experts of one group and of two: bytes of what is written,
    or a refusal with the same words."""
    write(tmp_path / "in", MEMBER, **LITTLE, moe_intermediate_size=size)
    document = describe(open_model(str(tmp_path / "in")))
    seen: list[bool] = []
    for one in document["conversions"]:
        what = ["--what", one["what"]] if one["to"] != "bf16" else []
        for row in one["ranks"]:
            out = tmp_path / f"{one['to']}-{one['what']}-{row['tp']}"
            args = (tmp_path / "in", out, "--to", one["to"], *what, "--tp", row["tp"])
            status, _, err = cli(capsys, *args)
            seen.append("problem" in row)
            if "problem" in row:
                assert (status, err) == (2, f"python -m tools.convert: {row['problem']}\n")
                continue
            assert status == 0, err
            for folder in out.glob("rank-*") if row["tp"] > 1 else [out]:
                held = sum(tensor.nbytes for tensor in tensors_of(folder).values())
                assert held == row["weight_bytes"]
    assert any(seen) and not all(seen)
    experts = next(
        c for c in document["conversions"] if (c["to"], c["what"]) == ("mxfp4", "experts")
    )
    fits = {row["tp"] for row in experts["ranks"] if "problem" not in row}
    assert fits == ({1} if size == 32 else {1, 2})
    as_it_is = [row.get("weight_bytes") for row in document["ranks"]]
    copied = [row.get("weight_bytes") for row in document["conversions"][0]["ranks"]]
    beyond = sum(t.nbytes for n, t in tensors_of(tmp_path / "in").items() if ".visual." in n)
    assert copied == [held and held + beyond for held in as_it_is]


def test_to_its_own_format_is_a_copy(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said as such, whole as for ranks."""
    status, out, _ = cli(capsys, little, little.parent / "out", "--to", "bf16")
    assert status == 0
    assert "all tensors are copies" in out
    found, wanted = tensors_of(little.parent / "out"), tensors_of(little)
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)


@pytest.mark.parametrize("args", TARGETS, ids=str)
def test_dry_run_says_what_is_then_written(
    little: Path, capsys: pytest.CaptureFixture[str], args: list[Any]
) -> None:
    """Files with their sizes, bytes by dtype; and nothing is touched."""
    edit_json(little / "generation_config.json", top_k=20)
    target = little.parent / "a" / "out"
    args = [little, target, *args, "--shard-bytes", "50KB"]
    with untouched(little.parent):
        status, out, err = cli(capsys, *args, "--dry-run", "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)
    status, text, _ = cli(capsys, *args, "--dry-run")
    assert status == 0 and "nothing is written" in text
    assert not target.parent.exists()
    assert cli(capsys, *args)[0] == 0
    folders = [target / folder for folder in plan["folders"]] or [target]
    nbytes: dict[str, int] = {}
    for folder in folders:
        files = {file["file"]: file for file in plan["files"]}
        found = {file.name for file in folder.iterdir()}
        assert found == {*files, *plan["beside"]}
        for name, file in files.items():
            held = load_file(folder / name)
            assert (folder / name).stat().st_size == file["bytes"]
            assert len(held) == file["tensors"]
            assert name in text
            for tensor in held.values():
                kind = str(tensor.dtype)
                nbytes[kind] = nbytes.get(kind, 0) + tensor.nbytes
    assert sorted(nbytes.values()) == sorted(plan["bytes_by_dtype"].values())
    assert sum(nbytes.values()) == plan["bytes"]


@pytest.mark.parametrize("size", [1, 2])
def test_the_room_that_is_asked_for_is_enough(
    little: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """It is at least what lies on the disk just before the notes are removed, and not much more."""
    target = little.parent / "out"
    options = Options("bf16", tp=size, shard_bytes=30_000)
    taken: list[int] = []
    remove = shutil.rmtree

    def measured(folder: Path) -> None:
        taken.append(sum(place.stat().st_blocks * 512 for place in [target, *target.rglob("*")]))
        remove(folder)

    asked: list[int] = []
    room = conversion.Outline.room

    def asking(self: Any, left: list[int]) -> int:
        asked.append(room(self, left))
        return asked[-1]

    monkeypatch.setattr(conversion.Outline, "room", asking)
    monkeypatch.setattr(shutil, "rmtree", measured)
    convert(little, target, options)
    assert taken[0] <= asked[0] <= taken[0] + 60_000


def test_a_disk_without_room_says_how_it_goes_on(
    little: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte too few is too few, headers and JSON included; then the same command goes on."""
    target = little.parent / "out"
    args = (little, target, "--to", "mxfp4", "--shard-bytes", 20_000)
    plan = json.loads(cli(capsys, *args, "--dry-run", "--json")[1])
    assert plan["disk_bytes"] > sum(file["bytes"] for file in plan["files"]) > plan["bytes"]
    stop_at(little, target, Options("mxfp4", shard_bytes=20_000), 0.5)
    later = json.loads(cli(capsys, *args, "--dry-run", "--json")[1])
    assert 0 < later["done"] < len(later["files"])
    assert later["disk_bytes"] < plan["disk_bytes"]
    usage = shutil.disk_usage(little)
    free = later["disk_bytes"] - 1
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        status, _, err = cli(capsys, *args)
    assert (status, err.count("\n")) == (2, 1)
    command = f"python -m tools.convert {little} {target} --to mxfp4 --shard-bytes 20000"
    assert f"the same command continues it: {command}" in err
    assert str(free) in err and str(free + 1) in err
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free + 1))
        assert cli(capsys, *args)[0] == 0
    assert not (target / UNFINISHED).exists()


# --- verification


@pytest.mark.parametrize("args", TARGETS, ids=str)
def test_a_conversion_verifies(
    little: Path, capsys: pytest.CaptureFixture[str], args: list[Any]
) -> None:
    """Whatever the files' sizes are; and not as a conversion to something else."""
    target = little.parent / "out"
    assert cli(capsys, little, target, *args, "--shard-bytes", "30KiB")[0] == 0
    with untouched(little.parent):
        status, out, _ = cli(capsys, little, target, *args, "--verify")
        assert status == 0 and "bit for bit" in out
        status, out, _ = cli(capsys, little, target, *args, "--verify", "--json")
        found = json.loads(out)
        held = [t for f in target.rglob("*.safetensors") for t in load_file(f).values()]
        assert found["difference"] is None and status == 0
        assert (found["tensors"], found["bytes"]) == (len(held), sum(t.nbytes for t in held))
        other = ["--to", "fp8" if "mxfp4" in args else "mxfp4"]
        assert cli(capsys, little, target, *other, "--verify")[0] in (1, 2)


def test_the_first_difference_is_named(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bit of a tensor, a tensor too many or of another shape, a key of config.json, a small file."""
    edit_json(little / "generation_config.json", top_k=20)
    target = little.parent / "out"
    convert(little, target, Options("mxfp4"))
    (file,) = target.glob("*.safetensors")
    before = {name: (target / name).read_bytes() for name in contents(target)}
    name = "model.language_model.layers.1.mlp.experts.1.up_proj.weight_scale"

    def differs(*words: str) -> None:
        status, out, err = cli(capsys, little, target, "--to", "mxfp4", "--verify")
        assert (status, err) == (1, "")
        assert not [word for word in words if word not in out], out
        for kept, content in before.items():
            (target / kept).write_bytes(content)

    def edit(change: Any) -> None:
        held = {n: t.clone() for n, t in load_file(file).items()}
        change(held)
        save_file(held, file)
        edit_json(target / "model.safetensors.index.json",
                  weight_map=dict.fromkeys(held, file.name))  # fmt: skip

    was = int(load_file(file)[name][3, 1])
    edit(lambda held: held[name][3, 1].add_(1))
    differs(f"{name}[3, 1]", f"{was + 1:02x}", f"{was:02x}")
    edit(lambda held: held.update({name: held[name][:-1].clone()}))
    differs(name, "U8")
    edit(lambda held: held.update({name: held[name].view(U8).float()}))
    differs(name, "F32")
    edit(lambda held: held.pop(name))
    differs("lacks", name)
    edit(lambda held: held.update(extra=held[name].clone()))
    differs("extra", "does not give")
    edit_json(target / "config.json", rms_norm_eps=3e-6)
    differs("config.json", "rms_norm_eps")
    (target / "generation_config.json").write_text("{}")
    differs("generation_config.json")
    assert verify(little, target, Options("mxfp4"), check=check).difference is None


def test_damage_is_no_difference(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that cannot be read, is missing or unfinished gives one line and status 2."""
    target = little.parent / "out"
    args = (little, target, "--to", "mxfp4", "--shard-bytes", 20_000, "--verify")
    stop_at(little, target, Options("mxfp4", shard_bytes=20_000), 0.5)
    status, _, err = cli(capsys, *args)
    assert (status, err.count("\n")) == (2, 1) and "unfinished" in err
    convert(little, target, Options("mxfp4", shard_bytes=20_000))
    assert cli(capsys, *args)[0] == 0
    file = sorted(target.glob("*.safetensors"))[2]
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    status, _, err = cli(capsys, *args)
    assert (status, err.count("\n")) == (2, 1) and file.name in err
    file.unlink()
    assert cli(capsys, *args)[0] == 2
    file.write_bytes(content)
    (target / "config.json").write_text("{")
    status, _, err = cli(capsys, *args)
    assert (status, err.count("\n")) == (2, 1) and "config.json" in err
    (target / "config.json").unlink()
    assert cli(capsys, *args)[0] == 2


def test_a_source_that_changed_is_a_difference(little: Path) -> None:
    """One bit of it; conversion.json, which says what was lost, is not compared."""
    convert(little, little.parent / "out", Options("bf16"))
    (little.parent / "out" / REPORT).unlink()
    edit_tensors(little, lambda held: held["lm_head.weight"].view(U8)[5, 7].bitwise_xor_(1))
    found = verify(little, little.parent / "out", Options("bf16"))
    assert found.difference is not None and "lm_head.weight[5, 3]" in found.difference
    with pytest.raises(InputError, match="no such folder"):
        verify(little.parent / "absent", little.parent / "out", Options("bf16"))


def test_a_head_that_is_tied_stays_so(tmp_path: Path) -> None:
    """And config.json says it, or differs."""
    write(tmp_path / "in", "0.8B")
    convert(tmp_path / "in", tmp_path / "out", Options("bf16"))
    assert verify(tmp_path / "in", tmp_path / "out", Options("bf16")).difference is None
    edit_json(tmp_path / "out" / "config.json", tie_word_embeddings=False)
    found = verify(tmp_path / "in", tmp_path / "out", Options("bf16"))
    assert found.difference is not None and "tie_word_embeddings" in found.difference
