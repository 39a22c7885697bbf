"""`import qwen35` in a notebook: six functions by name, and nothing imported before one is used."""

import gc
import importlib
import inspect
import subprocess
import sys
import weakref

import pytest

import qwen35

VERBS = ("load", "generate", "swap", "swapped", "trace", "diff")


def test_importing_imports_nothing() -> None:
    """Neither torch nor a module of this project: a notebook's first cell is instant."""
    script = (
        "import sys; before = set(sys.modules); import qwen35; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "assert not new - {'qwen35', *sys.stdlib_module_names}, new; "
        "assert not [name for name in sys.modules if name.startswith('qwen35.')]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_loading_does_without_torchs_compiler() -> None:
    """Its import takes as long as all else at the start of a command together."""
    script = "import sys, qwen35; qwen35.load('tiny'); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", VERBS)
def test_a_function_is_not_hidden_by_its_module(name: str) -> None:
    """Importing `qwen35.load` binds the module to the package, where the function has to stay."""
    for module in ("qwen35.load", "qwen35.generate", "qwen35.swap"):
        importlib.import_module(module)
    function = getattr(qwen35, name)
    assert inspect.isfunction(function)
    assert function.__name__ == name
    assert function.__doc__
    assert name in dir(qwen35)


def test_the_modules_are_still_there() -> None:
    """`from qwen35.load import TINY` and `python -m qwen35.generate` go through sys.modules."""
    from qwen35.generate import build_parser
    from qwen35.load import TINY

    assert TINY.is_dir()
    assert build_parser().prog == "python -m qwen35.generate"


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'qwen35' has no attribute 'genrate'"):
        qwen35.genrate  # noqa: B018


def test_the_embedded_model_by_its_name() -> None:
    """The docstring of the package promises this."""
    model = qwen35.load("tiny")
    completion = qwen35.generate(model, "In the beginning", max_new_tokens=8)
    assert str(completion) == completion.text
    assert len(completion.token_ids) == 8


@pytest.mark.parametrize("name", VERBS)
def test_help_shows_no_address(name: str) -> None:
    """A default that is a lambda says nothing there."""
    assert " at 0x" not in str(inspect.signature(getattr(qwen35, name)))


def test_a_model_that_is_gone_takes_no_memory() -> None:
    """What `generate` remembers about a folder does not keep its model alive."""
    model = qwen35.load("tiny")
    qwen35.generate(model, "In the beginning", max_new_tokens=1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
