"""Loads a Python file of the user: `--swap PATTERN=FILE.py:CLASS`, `--kernel FILE.py:NAME`."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


def name_of(file: str) -> str:
    """The name of a file's module: its path, so that it hides no module with another name."""
    return os.path.join(os.curdir, os.path.normpath(file))  # join drops "." before an absolute path


def load_file(file: str) -> ModuleType:
    """Execute a Python file as a module named by `name_of`. Its exceptions pass unchanged."""
    spec = importlib.util.spec_from_file_location(name_of(file), Path(file).absolute())
    assert spec and spec.loader, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module
