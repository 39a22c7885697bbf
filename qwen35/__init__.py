"""The interface for notebooks and programs.

    import qwen35
    model = qwen35.load("tiny")
    print(qwen35.generate(model, "In the beginning"))

`load`, `generate`, `swap`, `swapped`, `trace` and `diff` are imported when they are first used;
`import qwen35` alone imports no other module of the project. `qwen35.load` is the function,
although there is a module of this name; `from qwen35.load import ...` gives the other names of the
module.
"""

import importlib
import os
import signal
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen35.compare.diff import diff
    from qwen35.compare.trace import trace
    from qwen35.completion import generate
    from qwen35.load import load
    from qwen35.swap import swap, swapped

# torch's threads spin while they wait for each other, which makes them slow if anything else runs
# on the same cores. With this variable a thread sleeps after 1000 turns (LOG.md). libgomp reads it
# when torch is imported.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "1000"

# In a command (`python -m`), Ctrl-C during the import of torch ends the process without a
# traceback. `cli.run` restores Python's handler before the work begins.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

__all__ = ["diff", "generate", "load", "swap", "swapped", "trace"]

MODULES = {
    "diff": "qwen35.compare.diff",
    "generate": "qwen35.completion",
    "load": "qwen35.load",
    "swap": "qwen35.swap",
    "swapped": "qwen35.swap",
    "trace": "qwen35.compare.trace",
}


class _FrontDoor(ModuleType):
    """A package whose attributes are functions, although it has submodules of the same names."""

    def __getattr__(self, name: str) -> Any:
        if name not in MODULES:
            raise AttributeError(f"module 'qwen35' has no attribute {name!r}")
        return getattr(importlib.import_module(MODULES[name]), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds an imported submodule to its package, which would hide the function.
        if not (name in MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        special = {name for name in super().__dir__() if name.startswith("__")}
        return sorted({*special, *MODULES})


sys.modules[__name__].__class__ = _FrontDoor
