"""`python -m tools.inspect --prefix-cache DIR`: describe the folder of a prefix cache.

Only headers are read. Nothing is written, locked or marked as used, so running processes that use
the folder are not disturbed.
"""

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from qwen35.errors import InputError
from qwen35.prefix.folder import NAME, Found, examine
from qwen35.prefix.keys import root_of

SHOWN = 12  # hex digits of a key that are printed


@dataclass(frozen=True)
class Listed:
    """A file with the name of a segment. used: the time of its last use, in seconds since 1970."""

    key: str
    used: float
    found: Found

    @property
    def whole(self) -> bool:
        return self.found.segment is not None

    @property
    def damaged(self) -> bool:
        return not self.whole and self.found.removable


def list_folder(folder: Path) -> list[Listed]:
    """All files with names of segments, the least recently used first. InputError if there is no
    folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    listed: list[Listed] = []
    for entry in os.scandir(folder):
        file = Path(entry.path)
        try:
            if NAME.fullmatch(file.name) and entry.is_file(follow_symlinks=False):
                one = Listed(file.stem, entry.stat().st_mtime, examine(file))
                listed += [one] if one.whole or file.exists() else []
        except FileNotFoundError:  # evicted since the folder was listed
            continue
    return sorted(listed, key=lambda one: (one.used, one.key))


def describe_segments(listed: list[Listed]) -> dict[str, Any]:
    """The document that --json prints. Segments of one identity are listed together, each after its
    parent. `root`: the hash that the chains of an identity begin with."""
    identities = {root_of(one.found.identity): one.found.identity for one in listed if one.whole}
    segments: list[dict[str, Any]] = []
    summed: list[dict[str, Any]] = []
    for root, identity in identities.items():
        own = [_row(one, root) for one in listed if one.whole and one.found.identity == identity]
        segments += in_tree(own)
        nbytes = sum(row["bytes"] for row in own)
        summed.append({"root": root, "fields": identity, "segments": len(own), "bytes": nbytes})
    held = {row["key"] for row in segments}
    problems = [{"key": one.key, "problem": one.found.problem} for one in listed if not one.whole]
    problems += [
        {"key": row["key"], "problem": f"its parent {row['parent'][:SHOWN]} is not there"}
        for row in segments
        if row["parent"] and row["parent"] not in held
    ]
    return {
        "segments": segments,
        "identities": summed,
        "problems": problems,
        "bytes": sum(one.found.size for one in listed),
    }


def _row(one: Listed, root: str) -> dict[str, Any]:
    """A segment in the document. Its parent is None if it begins at token 0."""
    segment = one.found.segment
    assert segment is not None
    return {
        "key": one.key,
        "parent": segment.parent if segment.first else None,
        "depth": 0,
        "first": segment.first,
        "end": segment.end,
        "drafts": segment.drafts,
        "bytes": one.found.size,
        "used": datetime.fromtimestamp(one.used).astimezone().isoformat(timespec="seconds"),
        "root": root,
    }


def in_tree(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in tree order: each is followed by the rows that continue it. Sets `depth`."""
    held = {row["key"] for row in rows}
    following: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        parent = row["parent"] if row["parent"] in held else None
        following.setdefault(parent, []).append(row)
    ordered: list[dict[str, Any]] = []
    waiting = [(0, row) for row in reversed(following.get(None, []))]
    while waiting:
        depth, row = waiting.pop()
        ordered.append(row | {"depth": depth})
        waiting += [(depth + 1, after) for after in reversed(following.get(row["key"], []))]
    return ordered


def print_segments(document: dict[str, Any]) -> None:
    """Print the document as text."""
    for identity in document["identities"]:
        fields = ", ".join(f"{name} {_shown(text)}" for name, text in identity["fields"].items())
        print(fields)
        print(f"{identity['segments']} segments, {identity['bytes']:,} bytes")
        for row in document["segments"]:
            if row["root"] == identity["root"]:
                parent = row["parent"][:SHOWN] if row["parent"] else "start"
                drafts = ", drafts" if row["drafts"] else ""
                print(
                    f"{'  ' * (row['depth'] + 1)}{row['key'][:SHOWN]} after {parent}: tokens "
                    f"{row['first']}..{row['end']}{drafts}, {row['bytes']:,} bytes, "
                    f"last used {row['used']}"
                )
        print()
    print(f"{document['bytes']:,} bytes in all")
    if not document["problems"]:
        print("no problems")
    for row in document["problems"]:
        print(f"problem: {row['key'][:SHOWN]}: {_shown(row['problem'])}")


def _shown(text: str) -> str:
    return text if text and text.isprintable() else repr(text)
