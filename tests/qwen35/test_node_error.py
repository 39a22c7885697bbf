"""Nodes that were put in and break: the node, the exception and the line of its file, and only then."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwen35
from qwen35.cli import run
from qwen35.compare.diff import diff
from qwen35.compare.trace import trace
from qwen35.errors import InputError
from qwen35.generate import build_parser, main
from qwen35.load import TINY, load
from qwen35.node_error import NodeError, blaming, check_alike, watched
from qwen35.parallel.watch import RankLostError
from qwen35.swap import parse_swap, swap, swapped
from tests.support.family import small_model

HERE = "tests.qwen35.test_node_error"
NODE = "layers.2.mlp.shared_expert"
IDS = [5, 17, 42, 7, 99, 3, 58]


class Candidate(nn.Module):
    """A feed-forward that calls the node that it stands for."""

    def __init__(self, node: nn.Module) -> None:
        super().__init__()
        self.node = node

    @classmethod
    def from_reference(cls, module: nn.Module) -> "Candidate":
        return cls(module)

    def forward(self, x: Tensor) -> Any:
        return self.node(x)


class Raises(Candidate):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x[:, :3]  # the line that is named


class ReturnsNothing(Candidate):
    def forward(self, x: Tensor) -> None:
        self.node(x)


class ReturnsIntegers(Candidate):
    def forward(self, x: Tensor) -> Tensor:
        return self.node(x).int()


class ReturnsAnotherShape(Candidate):
    def forward(self, x: Tensor) -> Tensor:
        return self.node(x)[:, :-3]


class ReturnsAList(Candidate):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.node(x)]


class Misspelt(Candidate):
    @classmethod
    def from_reference(cls, module: nn.Module) -> "Candidate":
        return cls(nod)  # noqa: F821  # pyright: ignore


class WithoutArgument(Candidate):
    @classmethod
    def from_reference(cls) -> "Candidate":  # pyright: ignore
        return cls(nn.Identity())


class GivesNoModule(Candidate):
    @classmethod
    def from_reference(cls, module: nn.Module) -> None:  # pyright: ignore
        return None


def line_of(text: str) -> int:
    """The line of this file that has a text."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


FORWARDS = {  # what is put in -> words of the message
    Raises: [
        f"test_node_error.py:{line_of('the line that is named')}: RuntimeError: mat1 and mat2"
    ],
    ReturnsNothing: ["returned None; expected a tensor"],
    ReturnsIntegers: ["returned int32 [", "expected floats"],
    ReturnsAnotherShape: ["returned bfloat16 [", "253]"],
    ReturnsAList: ["returned a list; expected a tensor"],
}
CONSTRUCTORS = {
    Misspelt: [f"test_node_error.py:{line_of('cls(nod)')}: NameError: name 'nod'"],
    WithoutArgument: ["test_node_error.py:", "TypeError", "takes 1 positional argument"],
    GivesNoModule: ["from_reference returned None; expected a torch module"],
}


@pytest.mark.parametrize("kind", FORWARDS, ids=lambda kind: kind.__name__)
def test_a_forward_that_breaks(kind: Any) -> None:
    """It breaks in a generation, in a trace and in a comparison of each mode. The exception is the
    cause."""
    model = load(TINY, swaps=[(NODE, kind)])
    runs = [
        lambda: qwen35.generate(model, "The whale", max_new_tokens=2),
        lambda: trace(model, IDS),
        lambda: diff(TINY, IDS, swaps=[(NODE, kind)], stages="layers.2".__eq__),
        lambda: diff(TINY, IDS, swaps=[(NODE, kind)], mode="free", stages="layers.2".__eq__),
        lambda: diff(TINY, IDS, candidate=model, stages="layers.2".__eq__),
    ]
    for number, broken in enumerate(runs):
        with pytest.raises(NodeError) as caught:
            broken()
        message = str(caught.value)
        assert not [word for word in [NODE, *FORWARDS[kind]] if word not in message], message
        if kind is Raises:
            assert message.startswith(f"{NODE}: "), number
            assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("kind", CONSTRUCTORS, ids=lambda kind: kind.__name__)
def test_a_constructor_that_breaks(kind: Any) -> None:
    """While loading, by its full name, and in a model that is there."""
    for broken in (
        lambda: load(TINY, swaps=[(NODE, kind)]),
        lambda: swap(load(TINY), NODE, kind),
        lambda: load(TINY, swaps=[("layers.2", kind)]),
    ):
        with pytest.raises(NodeError, match=r"^layers\.2") as caught:
            broken()
        message = str(caught.value)
        assert not [word for word in CONSTRUCTORS[kind] if word not in message], message
        assert kind is GivesNoModule or caught.value.__cause__ is not None


def test_a_whole_layer_has_its_signature_checked() -> None:
    """Every other node has it checked as well."""
    with pytest.raises(InputError, match=r"layers\.2: Candidate\.forward takes \(x\)"):
        load(TINY, swaps=[("layers.2", Candidate)])


def test_what_comes_after_is_told_with_what_was_put_in() -> None:
    """The reference cannot go on: where it stopped, and the line and the return of the swapped node."""
    model = load(TINY, swaps=[(NODE, ReturnsAnotherShape)])
    with pytest.raises(NodeError) as caught:
        trace(model, IDS)
    line = line_of("class ReturnsAnotherShape") + 1
    message = str(caught.value)
    assert message.startswith("layers.2.mlp: ") and "moe.py:" in message
    assert f"{NODE} (" in message
    assert f"test_node_error.py:{line}) had returned bfloat16 [7, 253]" in message


@pytest.mark.parametrize("kind", [Raises, ReturnsNothing, Misspelt], ids=lambda k: k.__name__)
def test_the_command_line(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and status 2; all of it with --debug."""
    arguments = ["The whale", "--max-new-tokens", "2", "--swap", f"{NODE}={HERE}:{kind.__name__}"]
    with pytest.raises(SystemExit) as ended:
        run(build_parser(), main, arguments)
    said = [
        line for line in capsys.readouterr().err.splitlines() if "1 pattern swapped" not in line
    ]
    assert ended.value.code == 2 and len(said) == 1
    assert NODE in said[0] and "test_node_error.py:" in said[0]
    with pytest.raises(SystemExit) as ended:
        run(build_parser(), main, [*arguments, "--debug"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "Traceback" in said and "NodeError" in said


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(:\n", [":1: SyntaxError"]),
        ("x = 1\nimport no_such_thing\n", [":2: ModuleNotFoundError", "no_such_thing"]),
        ("x = 1\n\ny = nod\n", [":3: NameError", "'nod'"]),
        ("raise SystemExit(0)\n", [":1: SystemExit"]),
        ("x = 1\n", ["has no Kernel"]),
        ("Kernel = 1\n", ["has no from_reference"]),
    ],
)
def test_a_module_that_cannot_be_imported(
    source: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of the file, whatever the exception."""
    name = f"broken_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError) as caught:
        parse_swap(f"norm={name}:Kernel")
    message = str(caught.value)
    assert not [word for word in [name, *words] if word not in message], message


def test_a_router_has_two_outputs() -> None:
    """It may choose any number of experts, which is compared and not refused. But it must give both
    outputs, for every token."""
    model = small_model("397B-A17B")
    swap(model, "layers.0.mlp.gate", Candidate)
    gate = model.get_submodule("layers.0.mlp.gate")
    experts, weights = torch.zeros(5, 3).long(), torch.ones(5, 3)
    check_alike(gate, (experts, weights), (experts, weights))
    check_alike(gate, (experts[:, :2], weights[:, :2]), (experts, weights))
    for wrong in ((experts[:4], weights[:4]), (weights, experts), (experts,), weights):
        with pytest.raises(NodeError, match=r"^layers\.0\.mlp\.gate: .* returned"):
            check_alike(gate, wrong, (experts, weights))


def test_other_exceptions_pass() -> None:
    """They come from a model without swaps, from outside of the model, or from bad input."""
    model = small_model("397B-A17B")
    with pytest.raises(ZeroDivisionError), blaming(model):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="mat1") as caught, blaming(model):
        model.lm_head(torch.zeros(1, 3, dtype=model.dtype))
    assert not isinstance(caught.value, NodeError)
    swap(model, "norm", Candidate)
    with pytest.raises(ZeroDivisionError), blaming(model):
        raise ZeroDivisionError
    with pytest.raises(InputError, match=r"^no node$"), blaming(model):
        raise InputError("no node")


def test_a_lost_rank_is_no_fault_of_a_node() -> None:
    """It is none in the forward of a node that contains a swapped node, either."""
    model = small_model("397B-A17B")
    swap(model, "layers.0.mlp.shared_expert", Candidate)

    def lose(*_: object) -> None:
        raise RankLostError("connection closed")

    model.layers[0].mlp.register_forward_hook(lose)
    with pytest.raises(RankLostError), blaming(model):
        model(torch.tensor([[1, 2, 3]]), model.new_cache())


def test_a_watch_stays_with_its_node() -> None:
    """A replacement made by copy.copy shares its hooks with the node; that one must stay as it was."""

    class Copied:
        @classmethod
        def from_reference(cls, module: nn.Module) -> nn.Module:
            return copy.copy(module)

    model = small_model("397B-A17B")
    before = model.norm
    with swapped(model, "norm", Copied):
        assert watched(model.norm)
    assert model.norm is before and not watched(before)


def test_a_long_message_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler quotes the whole kernel, and says at the end what is wrong with it."""

    def fails(self: Candidate, x: Tensor) -> Tensor:
        raise RuntimeError(
            "at 5:10:\n" + "x = tl.load(p)\n" * 1000 + "NameError('p is not defined')"
        )

    monkeypatch.setattr(Candidate, "forward", fails)
    model = small_model("397B-A17B")
    swap(model, "norm", Candidate)
    with pytest.raises(NodeError, match=r"RuntimeError: at 5:10: x = tl\.load") as caught:
        trace(model, IDS)
    assert str(caught.value).endswith("x = tl.load(p) NameError('p is not defined')")
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_a_node_that_ends_the_process_is_named() -> None:
    """Its status would be taken for that of the command: 1 is a node that differs."""

    class Exits(nn.Module):
        @classmethod
        def from_reference(cls, _: nn.Module) -> "Exits":
            return cls()

        def forward(self, x: Tensor) -> Tensor:
            raise SystemExit(1)

    with pytest.raises(NodeError, match=r"^norm: .*SystemExit: 1"):
        diff(TINY, IDS, swaps=[("norm", Exits)], stages="norm".__eq__)
