"""Arguments that every command has in the same form: the model, and the number of threads."""

import pytest
import torch

from qwen35.cli import Parser, run


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
        == f"x: two models are given, {first} and {second}; one is expected\n"
    )


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
