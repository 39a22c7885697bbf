"""Figures that README and docs give, where counting them is cheap: each is counted again."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen35.config import Config
from qwen35.load import TINY, lay_out
from tests.test_architecture import ROOT, sources

PUBLISHED = Config.published("397B-A17B")


def instructions() -> tuple[int, int]:
    """Count the emulator's instructions, and those of them that are compared with AMD's pseudocode."""
    import tools.gfx950.emulator  # noqa: F401  (fills the table of instructions)
    from tests.tools.gfx950.test_instructions import evaluable
    from tools.gfx950.registry import BUILDERS

    return len(BUILDERS), len(evaluable())


def faults_of_the_reference() -> tuple[int]:
    from tests.reference.test_faults import FAULTS

    return (len(FAULTS),)


def faults_of_the_fast_path() -> tuple[int]:
    from tests.support.fault_kinds import planted

    return (sum(what.test.startswith("tests/fast/") for what in planted()),)


def launches_of_a_round() -> tuple[int]:
    """Count the launches of the 397B with three drafts, from the rounds of its first 4 and its
    first 8 layers."""
    pytest.importorskip("triton")
    from fast.catalogue import DRAFTS, fast
    from fast.step import Step

    def count(layers: int) -> int:
        config = replace(
            PUBLISHED, num_hidden_layers=layers, layer_types=PUBLISHED.layer_types[:layers]
        )
        model = lay_out(replace(config, num_experts=1, num_experts_per_tok=1)).bfloat16()
        fast(model, config, "gfx950", torch.device("meta"))
        return len(Step(model, 1024, DRAFTS).work)

    four, eight = count(4), count(8)
    return (four + (PUBLISHED.num_hidden_layers - 4) // 4 * (eight - four),)


def continuations(*options: str) -> tuple[int]:
    from tools.exact import SAMPLINGS, build_parser, states, walk

    lengths, ways = walk(build_parser().parse_args([*options]))
    return (len(ways) * len(SAMPLINGS) * sum(states(length) + 2 for length in lengths),)


def layers() -> tuple[int, int, int, int]:
    kinds = PUBLISHED.layer_types
    linear, full = (kinds.count(f"{kind}_attention") for kind in ("linear", "full"))
    return linear, full, PUBLISHED.num_experts_per_tok, PUBLISHED.num_experts


def embedded() -> tuple[int, ...]:
    config = Config.from_file(TINY / "config.json")
    return (
        config.num_hidden_layers, config.hidden_size, config.num_experts_per_tok, config.num_experts,
    )  # fmt: skip


def held_out() -> tuple[int]:
    from tools.bench.language import HELDOUT, SEPARATOR

    return (len(HELDOUT.read_text().split(f"\n{SEPARATOR}\n")),)


FIGURES: list[tuple[str, str, Callable[[], tuple[int, ...]]]] = [
    ("README.md", r"(\d+) gated delta-net layers, (\d+) gated attention .* top-(\d+) of (\d+)", layers),
    ("README.md", r"\((\d+) MB\)", lambda: (round((TINY / "model.safetensors").stat().st_size / 1e6),)),
    ("README.md", r"bit for bit \| ([\d,]+) ways", lambda: continuations("--all")),
    ("README.md", r"--all compares ([\d,]+) ways", lambda: continuations("--all")),
    ("docs/exactness.md", r"nine prompts in ([\d,]+) ways", lambda: continuations("--all")),
    ("docs/exactness.md", r"continues a prompt in (\d+) ways", continuations),
    ("docs/emulator.md", r"knows (\d+) instructions\. (\d+) of them", instructions),
    ("docs/diff.md", r"(\d+) planted faults", faults_of_the_reference),
    ("docs/fast.md", r"(\d+) planted faults", faults_of_the_fast_path),
    ("docs/fast.md", r"(\d+) launches a round of the 397B", launches_of_a_round),
    ("docs/generate.md", r"(\d+) layers \(.*\) of width (\d+), .* top-(\d+) of (\d+)", embedded),
    ("docs/generate.md", r"over (\d+) held-out prompts", held_out),
]  # fmt: skip


@pytest.mark.parametrize(("page", "pattern", "count"), FIGURES, ids=[f[1][:40] for f in FIGURES])
def test_a_figure_is_what_is_counted(
    page: str, pattern: str, count: Callable[[], tuple[int, ...]]
) -> None:
    text = " ".join((ROOT / page).read_text().split())
    found = re.search(pattern, text)
    assert found, f"{page} does not say {pattern!r}"
    assert tuple(int(number.replace(",", "")) for number in found.groups()) == count()


def test_the_reference_has_as_many_lines_as_the_readme_says() -> None:
    said = re.search(r"fewer than (\d+) lines", (ROOT / "README.md").read_text())
    total = sum(len(file.read_text().splitlines()) for file in sources("reference"))
    assert said and int(said[1]) - 100 < total < int(said[1])


def test_the_readme_is_short() -> None:
    assert len(Path(ROOT / "README.md").read_text().split()) <= 900
