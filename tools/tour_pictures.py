"""`python -m tools.tour_pictures`: draw the pictures of docs/tour.md into docs/.

--check writes nothing, and exits with 1 if a file in docs/ is not what this tool draws.
"""

import argparse
import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from qwen35.cli import Parser, run
from weights.storage import whole

DOCS = Path(__file__).parents[1] / "docs"
INK, PALE, MIXER, FEED, STATE = "#1b2733", "#eef2f6", "#cfe3f5", "#dcefd9", "#f7e3c4"


@dataclass
class Picture:
    """An SVG of boxes, arrows and words. Coordinates are pixels from the upper left corner."""

    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def box(self, x: int, y: int, w: int, h: int, text: str, fill: str = PALE) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="{INK}"/>'
        )
        lines = text.split("\n")
        top = y + h / 2 - 8 * (len(lines) - 1) + 4
        for i, line in enumerate(lines):
            self.words(x + w // 2, round(top + 16 * i), line, "middle")

    def words(self, x: int, y: int, text: str, anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self, *points: tuple[int, int]) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" marker-end="url(#tip)"/>'
        )

    def svg(self) -> str:
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" font-family="sans-serif" font-size="13" '
            f'fill="{INK}">\n<rect width="100%" height="100%" fill="white"/>\n{tip}\n{body}\n</svg>\n'
        )


def layer() -> Picture:
    """A decoder layer: two sub-layers, each behind a norm, added to the residual stream."""
    p = Picture(800, 190)
    p.words(20, 95, "x")
    p.arrow((32, 90), (690, 90))
    for x, norm, node, kind, fill in (
        (70, "input_layernorm", "mixer", "linear_attn: 3 of 4 layers\nself_attn: every 4th", MIXER),
        (390, "post_attention_\nlayernorm", "mlp", "gate, experts,\nshared_expert", FEED),
    ):
        p.arrow((x, 90), (x, 36), (x + 12, 36))
        p.box(x + 14, 14, 122, 44, norm)
        p.arrow((x + 138, 36), (x + 148, 36))
        p.box(x + 150, 8, 108, 56, node, fill)
        p.arrow((x + 204, 66), (x + 204, 82))
        p.parts.append(f'<circle cx="{x + 204}" cy="90" r="7" fill="white" stroke="{INK}"/>')
        p.words(x + 204, 94, "+", "middle")
        for i, line in enumerate(kind.split("\n")):
            p.words(x + 204, 124 + 16 * i, line, "middle")
    p.box(214, 146, 120, 36, "state", STATE)
    p.words(344, 168, "keys and values, or a matrix a head: what the next pass starts from")
    return p


def delta_rule() -> Picture:
    """The delta rule: how one token changes the state of one head."""
    p = Picture(720, 240)
    p.box(20, 60, 130, 110, "state S\n[K, V]", STATE)
    p.arrow((152, 115), (188, 115))
    p.box(190, 85, 100, 60, "decay\nS · exp(g)")
    p.arrow((292, 115), (338, 115))
    p.box(340, 85, 120, 60, "recall\nk · S")
    p.arrow((400, 147), (400, 186))
    p.box(320, 188, 160, 40, "delta = β (v - recall)")
    p.words(20, 212, "k, v, β of the token")
    p.arrow((160, 208), (318, 208))
    p.arrow((462, 115), (508, 115))
    p.box(510, 85, 120, 60, "write\nS + k ⊗ delta", STATE)
    p.arrow((482, 208), (570, 208), (570, 147))
    p.arrow((570, 83), (570, 46))
    p.box(510, 8, 120, 36, "read: q · S", MIXER)
    p.arrow((632, 115), (700, 115))
    p.words(638, 105, "next token")
    p.words(20, 30, "The read-out goes through the gated norm.")
    return p


def round_() -> Picture:
    """A decode round: three drafts, one verification pass over four rows, and acceptance."""
    p = Picture(760, 260)
    rows = (75, 205, 335, 465)
    p.box(20, 20, 110, 40, "newest token")
    for i, x in enumerate(rows[1:]):
        p.arrow((x - 73, 40), (x - 52, 40))
        p.box(x - 50, 20, 100, 40, f"MTP head\ndraft {i + 1}", FEED)
    for i, x in enumerate(rows):
        p.arrow((x, 62), (x, 92))
        p.words(x + 6, 80, f"row {i}")
        p.arrow((x, 136), (x, 160))
    p.box(20, 94, 500, 40, "trunk: one pass over the four rows, each as if it were alone", MIXER)
    p.box(20, 162, 500, 40, "the model's own token after each row")
    p.arrow((522, 182), (566, 182))
    p.box(568, 146, 170, 72, "keep the drafts up to\nthe first that is not\nthe model's own", STATE)
    p.arrow((653, 220), (653, 242), (8, 242), (8, 40), (18, 40))
    token = "the model's token after the last kept row begins the next round"
    p.words(24, 232, f"{token}, from the states after that row")
    return p


def prefix_cache() -> Picture:
    """The prefix cache: the segments of a prompt, and how a second prompt uses them."""
    p = Picture(760, 200)
    p.words(20, 30, "first prompt")
    for i in range(3):
        p.box(120 + 130 * i, 10, 128, 30, "64 tokens", STATE)
        p.arrow((184 + 130 * i, 42), (184 + 130 * i, 64))
    p.box(510, 10, 90, 30, "tail")
    kept = "kept: keys and values, and the delta nets' states"
    p.box(120, 66, 388, 36, kept, MIXER)
    p.words(520, 88, "under a chained hash of the ids")
    p.words(20, 150, "second prompt")
    p.arrow((248, 104), (248, 128))
    p.box(120, 130, 258, 30, "the same 128 tokens: copied", STATE)
    p.box(380, 130, 220, 30, "computed from here on")
    p.words(120, 184, "A hit ends on the grid of 64 tokens, where a segment ends.")
    return p


PICTURES = {
    "tour-layer": layer,
    "tour-delta-rule": delta_rule,
    "tour-round": round_,
    "tour-prefix-cache": prefix_cache,
}


def build_parser() -> Parser:
    parser = Parser("python -m tools.tour_pictures", __doc__ or "", computes=False)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing, and exit with 1 if a file in docs/ differs",
    )
    return parser


def main(args: argparse.Namespace) -> int:
    drawn = {DOCS / f"{name}.svg": draw().svg() for name, draw in PICTURES.items()}
    if args.check:
        wrong = [
            path.name
            for path, text in drawn.items()
            if not path.exists() or path.read_text(encoding="utf-8") != text
        ]
        for name in wrong:
            print(f"docs/{name} is not what tools/tour_pictures.py draws", file=sys.stderr)
        return 1 if wrong else 0
    for path, text in drawn.items():
        with whole(path) as part:
            part.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(build_parser(), main)
