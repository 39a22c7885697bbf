"""Arguments that every command has in the same form: the model, and the number of threads."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35.cli import Parser, at_least_one, named, output_file, run, size


@pytest.mark.parametrize(
    ("words", "model"),
    [
        ((), "tiny"), (("a",), "a"), (("--model", "a"), "a"), (("tiny",), "tiny"),
        (("a", "--model", "a"), "a"),
    ],
)  # fmt: skip
def test_a_model_has_two_ways_of_being_named(words: tuple[str, ...], model: str) -> None:
    parser = Parser("x", "y")
    parser.add_model()
    assert parser.parse_args(words).model == model


@pytest.mark.parametrize(
    "words",
    [
        ("a", "--model", "b"),
        ("--model", "a", "b"),
        ("tiny", "--model", "b"),
        ("--model", "a", "tiny"),
    ],
)
def test_two_models_are_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("x", "y")
    parser.add_model()
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words)
    assert ended.value.code == 2
    first, second = (word for word in words if word != "--model")
    assert (
        capsys.readouterr().err
        == f"x: two models are given, {first!r} and {second!r}; one is expected\n"
    )


def test_a_model_by_its_option_where_there_is_no_default() -> None:
    """argparse also sets the positional argument, to None."""
    parser = Parser("x", "y")
    parser.add_model(default=None)
    assert parser.parse_args(["--model", "a"]).model == "a"
    assert parser.parse_args([]).model is None


@pytest.mark.parametrize(
    ("kind", "text", "line"),
    [
        (int, "nan", "'nan'; expected an integer"),
        (int, "", "''; expected an integer"),
        (int, "1.5", "'1.5'; expected an integer"),
        (int, "9" * 19, f"'{'9' * 19}'; expected at most 18 digits"),
        (float, "", "''; expected a number"),
        (float, "1,5", "'1,5'; expected a number"),
        (Path, "", "''; expected the name of a file or folder"),
        (named, "", "''; expected the name of a file or folder"),
        (at_least_one, "0", "'0'; expected a number of at least 1"),
        (
            at_least_one,
            "1000000000001",
            "'1000000000001'; expected a number of at most 1,000,000,000",
        ),
        (at_least_one, "9" * 5000, "expected at most 18 digits"),
        (size, "9" * 5000, "expected a number of bytes, as in 4000000, 64M, 4GiB or 4GB"),
        (output_file, "", "''; expected the name of a file or folder"),
        (output_file, "/", "'/' is a folder; expected the name of a file"),
        (output_file, "/no/x", "'/no/x'; expected a file in a folder that exists"),
    ],
)
def test_a_wrong_value_names_the_option_and_what_was_expected(
    kind: Any, text: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser("x", "y")
    parser.add_argument("--it", type=kind)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([f"--it={text}"])
    err = capsys.readouterr().err
    assert (
        ended.value.code == 2 and err.startswith("x: argument --it: ") and err.endswith(f"{line}\n")
    )


def test_right_values_of_each_kind() -> None:
    parser = Parser("x", "y")
    for name, kind in (("--int", int), ("--float", float), ("--path", Path)):
        parser.add_argument(name, type=kind)
    found = parser.parse_args(["--int=-3", "--float=1e-3", "--path=a/b"])
    assert (found.int, found.float, found.path) == (-3, 0.001, Path("a/b"))


def test_where_a_text_stands_the_model_is_an_option() -> None:
    parser = Parser("x", "y")
    parser.add_argument("prompt")
    parser.add_model(alone=False)
    found = parser.parse_args(["In the beginning", "--model", "a"])
    assert (found.prompt, found.model) == ("In the beginning", "a")


def test_threads_are_set_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for words in ([], ["--threads", "3"]):
        with pytest.raises(SystemExit):
            run(Parser("x", "y"), lambda args: 0, words)
    assert asked == [3]


@pytest.mark.parametrize("count", ["1025", "20000", "100000"])
def test_more_threads_than_any_machine_has_are_refused(
    count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line refuses them, because torch's thread pool would end the process."""
    with pytest.raises(SystemExit) as ended:
        run(Parser("x", "y"), lambda args: 0, ["--threads", count])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"x: argument --threads: '{count}'; expected a number of at most 1,024\n"
    )


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        (
            {"RANK": "1", "LOCAL_RANK": "1"},
            True,
        ),  # started by hand, maybe with arguments of its own
        ({"RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, True),  # of another host
    ],
)
def test_bad_arguments_of_all_ranks_are_told_once(
    environment: dict[str, str],
    speaks: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        Parser("x", "y").parse_args(["--tp", "3"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == ("x: unrecognized arguments: --tp 3\n" if speaks else "")


def test_a_command_that_computes_nothing_has_no_threads() -> None:
    with pytest.raises(SystemExit):
        Parser("x", "y", computes=False).parse_args(["--threads", "3"])
