"""`python -m tools`: list the command lines."""

import ast
import re
from pathlib import Path

from qwen35.cli import Parser, run

FOLDER = Path(__file__).parent
HEAD = re.compile(r"`python -m [^`]*`: ")  # with which most of the docstrings begin


def commands() -> dict[str, str]:
    """Each command line and what it does, from the first sentence of its module."""
    found: dict[str, str] = {}
    for file in sorted([*FOLDER.glob("*.py"), FOLDER / "bench" / "__main__.py"]):
        text = file.read_text(encoding="utf-8")
        if 'if __name__ == "__main__"' in text and file != Path(__file__):
            name = file.parent.name if file.stem == "__main__" else file.stem
            words = HEAD.sub("", " ".join((ast.get_docstring(ast.parse(text)) or "").split()))
            found[f"python -m tools.{name}"] = re.split(r"[.:](?: |$)", words)[0]
    return dict(sorted(found.items()))


def main(_: object) -> int:
    listed = {"python -m qwen35.generate": "generate text"} | commands()
    width = max(map(len, listed))
    for command, what in listed.items():
        print(f"{command:{width}}  {what}")
    print("each of them has --help")
    return 0


if __name__ == "__main__":
    run(Parser("python -m tools", "List the command lines.", computes=False), main)
