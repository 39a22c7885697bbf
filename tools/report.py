"""The HTML page of a comparison, with verdict, heat map and table, in one self-contained file."""

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from qwen35.compare.judge import BINS, MOST

PAGE = Path(__file__).parent / "page"  # the HTML, CSS and JavaScript parts of the page
STYLE, SCRIPT, BODY, READING = (
    (PAGE / name).read_text(encoding="utf-8")
    for name in ("style.css", "script.js", "body.html", "reading.html")
)


def page(document: dict[str, Any]) -> str:
    """The HTML page of a report with the keys "pass", "title", "mode", "rows" (worst first),
    "tokens", "swapped" and "run"."""
    title = escape(str(document["title"]))
    data = {"rows": _plain(document["rows"]), "most": MOST, "bins": BINS, "mode": document["mode"]}
    # The data has no "<", so that </script> or <!-- in a name cannot end the element.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{"pass" if document["pass"] else "FAIL"}: {title}</title>
<style>
{STYLE}</style>
</head>
<body>
{_summary(document, title)}
{_made(document)}

{READING}
<noscript><p>The heat map and the table need JavaScript.</p></noscript>
<main>
{BODY}</main>
<script type="application/json" id="data">{text}</script>
<script>
{SCRIPT}</script>
</body>
</html>
"""


def _summary(document: dict[str, Any], title: str) -> str:
    """The verdict and its counts, which need no JavaScript."""
    rows = document["rows"]
    nodes = {row["node"] for row in rows}
    failing = {row["node"] for row in rows if not row["pass"]}
    broken = sum(not row["pass"] for row in rows)
    if not rows:
        verdict = "Nothing was compared"
    elif document["pass"]:
        verdict = "✓ Pass: no node differs by more than bfloat16 explains"
    else:
        verdict = "✕ Fail: " + (
            "1 node differs" if len(failing) == 1 else f"{len(failing)} nodes differ"
        )
    facts = [
        ("nodes that fail", f"{len(failing)} of {len(nodes)}"),
        ("rows that fail", f"{broken} of {len(rows)}"),
        ("most likely token", _tokens(document["tokens"])),
    ]
    if broken:
        first = next(row for row in rows if not row["pass"])
        name = escape(f"{first['node']} {first['tensor']}, {first['phase']}")
        facts.insert(
            0,
            ("first failing row", f'<button type="button" class="link" id="first">{name}</button>'),
        )
    listed = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts)
    return f"""<header class="verdict{"" if document["pass"] else " fail"}">
<h1><b>{verdict}</b></h1>
<p class="soft">{title}</p>
</header>
<dl class="facts">{listed}</dl>"""


def _made(document: dict[str, Any]) -> str:
    """The command, as a fold. Inside are the other facts that are needed to repeat the run, and the
    swaps."""
    facts = dict(document["run"])
    command = facts.pop("command")
    swapped: dict[str, list[str]] = {}
    for node, kind in document["swapped"].items():
        swapped.setdefault(kind, []).append(node)
    lines = [
        ("swapped", f"{kind} stands for {', '.join(found)}") for kind, found in swapped.items()
    ]
    listed = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in [*facts.items(), *lines]
    )
    return f"""<details class="made"><summary>{escape(command)}</summary>
<dl>{listed}</dl></details>"""


def _tokens(tokens: dict[str, Any]) -> str:
    if not tokens["compared"]:
        return "not compared"
    text = f"{tokens['equal']} of {tokens['compared']} equal"
    if tokens["first"] is None:
        return text
    text += f"; first other one at {tokens['first']}"
    if tokens["margin"] is not None:
        text += f", where the oracle's logits are {tokens['margin']:.3g} apart"
    return escape(text)


def _plain(value: Any) -> Any:
    """A copy that JSON can hold: NaN becomes None, and infinities become MOST or -MOST."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(MOST, value)
    return value
