"""The exactness contract on the embedded model: a part of what `python -m tools.exact` walks."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from qwen35.cli import run
from qwen35.generation import Generation
from qwen35.load import TINY, load
from qwen35.prefix.cache import PrefixCache
from qwen35.sampling import Sampling
from reference.model import Model
from tests.support.command import in_process
from tools import exact
from tools.exact import build_parser, cells, differing, hit_lengths, main, prompt_of


@cache
def embedded() -> Model:
    return load(TINY)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 200])
def test_continuations_agree(length: int) -> None:
    """Nothing kept, a hit at each length, eviction: at two depths and chunks, greedy and sampled."""
    prompt = prompt_of(length, 2000)
    found = [
        cell
        for name, depth, chunk in [("greedy", 0, 64), ("greedy", 3, 4096), ("sampled", 2, 128),
                                   ("sampled", 0, 512)]
        for cell in cells(embedded(), prompt, name, depth, chunk, tokens=6)
    ]  # fmt: skip
    assert len(found) >= 4 * (2 + length // 64)
    assert not differing(found)


def test_long_prompts_agree() -> None:
    """The prompts have many blocks, are cut in other places, and hit in the middle."""
    prompt = prompt_of(700, 2000)
    found = list(cells(embedded(), prompt, "greedy", 3, 4096, tokens=6))
    found += list(cells(embedded(), prompt, "greedy", 1, 128, tokens=6))[:2]
    assert len(found) == 2 + 10 + 2 + 2
    assert not differing(found)


@pytest.mark.parametrize("threads", [2, 3])
def test_continuations_agree_with_more_threads(threads: int) -> None:
    """Another number of threads may give other bits, but every way to continue has the same ones.
    The dtype is float32, which rounds no bit away."""
    model, prompt = load(TINY, dtype=torch.float32), prompt_of(130, 2000)
    torch.set_num_threads(threads)
    try:
        found = list(cells(model, prompt, "greedy", 3, 64, tokens=4))
        found.append(next(cells(model, prompt, "greedy", 0, 4096, tokens=4)))
    finally:
        torch.set_num_threads(1)
    assert len(found) >= 4
    assert not differing(found)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """It uses a folder that another process wrote, as a user runs it."""
    arguments = ["--lengths", "65", "130", "--depths", "3", "--chunks", "64", "--json"]
    with pytest.raises(SystemExit) as ended:
        run(build_parser(), main, [*arguments, "--new-tokens", "5"])
    document = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert document["pass"] and not document["differ"]
    # Of each prompt: none, miss, hits, evicted, refilled, and two processes.
    assert document["cells"] == 2 * ((4 + 1 + 2) + (4 + 2 + 2))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--lengths", "65", "40000"), "the prompt has 40000 tokens, the context 32768"),
        (("--lengths", "65", "-3"), "argument --lengths: '-3'; expected a number of at least 1"),
        (("--depths", "3", "-1"), "argument --depths: '-1'; expected a number of at least 0"),
        (("--chunks", "64", "100"), "prefill_chunk = 100; expected a multiple of 64, the grid"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(
    arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first of the two values is good, and would be computed for minutes."""
    monkeypatch.setattr(Generation, "__iter__", lambda self: pytest.fail("a prompt was continued"))
    status, out, err = in_process(build_parser, main, capsys)(*arguments)
    assert (status, out, err) == (2, "", f"python -m tools.exact: {line}\n")


def test_a_prompt_has_as_many_ids_as_are_asked_for() -> None:
    """A longer one begins with the shorter one, beyond 65,536 ids too."""
    longer = prompt_of(70_000, 2000)
    assert len(longer) == 70_000 and max(longer) == 1999
    assert longer[:3000] == prompt_of(3000, 2000)


@pytest.mark.parametrize("length, hits, expected", [
    (63, None, []), (63, 3, []), (130, None, [64, 128]), (130, 9, [64, 128]), (700, 1, [640]),
    (700, 3, [64, 384, 640]), (20_000, 2, [64, 19_968]),
])  # fmt: skip
def test_hits_of_a_long_prompt_are_spread(
    length: int, hits: int | None, expected: list[int]
) -> None:
    assert hit_lengths(length, hits) == expected


def test_few_hits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the two processes, whose hit is always the whole one."""
    monkeypatch.setattr(exact, "in_other_processes", lambda *_: [])
    arguments = ["--lengths", "260", "--depths", "1", "--chunks", "128", "--hits", "2", "--json"]
    with pytest.raises(SystemExit) as ended:
        run(build_parser(), main, [*arguments, "--new-tokens", "2"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["cells"] == 2 * (4 + 2)


def test_a_difference_is_found() -> None:
    """One bit of the digest differs, one token, or the drafts of one depth."""
    found = list(cells(embedded(), prompt_of(70, 2000), "greedy", 2, 64, tokens=4))
    assert not differing(found)
    for change in ({"digest": "0"}, {"tokens": (1, 2, 3, 4)}, {"drafts": ((9,), (9,))}):
        assert differing([*found, replace(found[0], **change)]) == [replace(found[0], **change)]
    other_depth = replace(found[0], depth=1, drafts=((9,), (9,)))
    assert not differing([*found, other_depth])


def test_a_prompt_is_as_long_as_is_asked() -> None:
    """Beyond 65,536 tokens too; a shorter one is a prefix of it."""
    long = prompt_of(200_000, 2000)
    assert len(long) == 200_000
    for length in (1, 2, 15, 16, 17, 63, 700, 3000, 70_000):
        assert prompt_of(length, 2000) == long[:length]


@pytest.mark.parametrize("option", ["--lengths", "--depths", "--chunks"])
def test_a_number_below_the_least_is_one_line(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(build_parser(), main, [f"{option}=-5"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert f"{option}: '-5'; expected a number of at least" in err


def test_a_hit_that_is_none_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although the bits are those of a miss: as a difference, with the reason, and status 1."""
    begin = PrefixCache.begin

    def forgetful(self: PrefixCache, ids: list[int], **settings: Any) -> Any:
        reuse = begin(self, ids, **settings)
        reuse.chain, reuse.length, reuse.reason = [], 0, "it forgets"
        return reuse

    monkeypatch.setattr(PrefixCache, "begin", forgetful)
    monkeypatch.setattr(exact, "in_other_processes", lambda *_: [])
    words = ["--lengths", "65", "--depths", "0", "--chunks", "64", "--new-tokens", "2"]
    with pytest.raises(SystemExit) as ended:
        run(build_parser(), main, words)
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1
    said = "DIFF  65 tokens, greedy, depth 0, chunk 64, cache hit 64; 0 tokens cached, not 64: it forgets"
    assert said in lines and not any("cache none" in line or "miss" in line for line in lines)


def test_the_digest_is_of_every_bit() -> None:
    """It changes with the last bit of one logit of the last token."""

    def digest(change: float) -> str:
        model = embedded()
        result = Generation(model, [5, 6, 7], 3, Sampling(), frozenset(), 0, digest=True)
        weight = model.lm_head.weight
        steps = iter(result)
        next(steps), next(steps)
        before = weight[7, 3].item()
        with torch.inference_mode():
            weight[7, 3] += change
        next(steps)
        with torch.inference_mode():
            weight[7, 3] = before
        return result.logits_sha256

    assert digest(0.0) == digest(0.0) != digest(0.05)


def test_a_device_that_is_not_there_is_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, since 1 says that a bit differs."""
    with pytest.raises(SystemExit) as ended:
        run(build_parser(), main, ["--device", "cuda:99"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert "cuda:99" in err
