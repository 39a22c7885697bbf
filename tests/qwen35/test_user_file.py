"""`--swap PATTERN=FILE.py:CLASS`: a class in a file, and how the file's errors are told."""

import sys
from pathlib import Path

import pytest
import torch

import qwen35
from qwen35.errors import InputError
from qwen35.load import load
from qwen35.node_error import NodeError
from qwen35.swap import parse_swap, replaced, swap, swapped
from qwen35.user_file import load_file, name_of

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
import torch

@dataclass
class Settings:
    factor: float = 1.0

class Norm(torch.nn.Module):
    @classmethod
    def from_reference(cls, node):
        made = cls()
        made.node, made.factor = node, Settings().factor
        return made

    def forward(self, x):
        return self.node(x) * self.factor

class Broken(Norm):
    def forward(self, x):
        return nothing
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file in the current folder, with the name of a package that is imported already."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference.py").write_text(SOURCE)
    return "reference.py"


def test_a_file_hides_no_module(file: str) -> None:
    before = sys.modules["reference"]
    module = load_file(file)
    assert sys.modules["reference"] is before
    assert module.__name__ == name_of(file) == "./reference.py" and module.Settings().factor == 1
    assert name_of("/a/b.py") == "/a/b.py" and name_of("a/../b.py") == "./b.py"


@pytest.mark.parametrize("form", ["text", "pair", "swap", "swapped"])
def test_a_class_of_a_file_replaces_nodes(file: str, form: str) -> None:
    """Each form of Python that names a class by a text is tried."""
    text = f"norm={file}:Norm"
    if form == "text":
        model = load("tiny", swaps=[text])
    elif form == "pair":
        model = load("tiny", swaps=[("norm", f"{file}:Norm")])
    else:
        model = load("tiny")
    if form == "swap":
        assert swap(model, "norm", f"{file}:Norm") == ["norm"]
    if form == "swapped":
        with swapped(model, "norm", f"{file}:Norm"):
            assert replaced(model) == ["norm=./reference.py:Norm"]
    else:
        assert replaced(model) == ["norm=./reference.py:Norm"]
    assert str(qwen35.generate(model, "In the", max_new_tokens=2))


def test_an_error_in_the_class_is_told_with_its_line(file: str) -> None:
    with pytest.raises(NodeError, match=r"^norm: reference\.py:22: NameError"):
        qwen35.generate(load("tiny", swaps=f"norm={file}:Broken"), "In the")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("norm=nowhere.py:Norm", "--swap 'norm=nowhere.py:Norm': nowhere.py: no such file"),
        ("norm=reference.py:Other", "reference.py has no Other"),
        ("norm=reference.py:Settings", "Settings has no from_reference"),
        ("norm=reference.py", "expected PATTERN=MODULE:CLASS or FILE.py:CLASS"),
        ("norm=broken.py:Norm", "broken.py:2: NameError"),
    ],
)
def test_what_a_text_does_not_name_is_said(file: str, text: str, message: str) -> None:
    Path("broken.py").write_text("\nnothing\n")
    with pytest.raises(InputError) as caught:
        parse_swap(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "swaps",
    [[("norm", torch.nn.ReLU)], [("norm", 3)], [3], ["norm"], [("norm", "nowhere:X")], [(1, 2)]],
)
def test_swaps_of_another_form_are_refused(swaps: list[object]) -> None:
    with pytest.raises(InputError):
        load("tiny", swaps=swaps)  # pyright: ignore


def test_a_name_is_no_model() -> None:
    """A swap changes a model, so there has to be one."""
    with pytest.raises(InputError, match=r"model = 'tiny'; expected a loaded model"):
        swap("tiny", "norm", "reference.norm:RMSNorm")  # pyright: ignore
