"""`python -m tools.tour`: compute the numbers of docs/tour.md from the embedded model.

The page has the numbers between markers. Without an option this prints them. --write puts them into
the page. --check exits with 1 if the page differs: in a line of code, in a shape, or in a number
with a decimal point that is off by more than 2% and more than 0.005.
"""

import argparse
import ast
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qwen35.cache import Cache, DeltaState, KVCache
from qwen35.cli import Parser, run
from qwen35.compare.trace import recording, trace
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.generation import prefill
from qwen35.load import lay_out, load
from qwen35.sampling import Sampling
from qwen35.speculative import Decoder
from qwen35.tokenizer import Tokenizer
from reference.model import Model
from weights.storage import whole

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tour.md"
PROMPT = "In the beginning God created"
PUBLISHED = "397B-A17B"
DELTA, ATTENTION = "layers.0.linear_attn", "layers.3.self_attn"
MARKED = re.compile(r"(<!-- tour: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
# Numbers with a decimal point. Shapes and line numbers have none, so they have to be equal.
NUMBER = re.compile(r"(?<![\w.\]])-?\d+\.\d+(?![\w.])")


def build_parser() -> Parser:
    parser = Parser("python -m tools.tour", __doc__ or "")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", action="store_true", help="put the numbers into docs/tour.md")
    group.add_argument(
        "--check",
        action="store_true",
        help="compare docs/tour.md with the numbers, and exit with 1 if it differs",
    )
    return parser


@cache
def model() -> Model:
    return load("tiny")


@cache
def tokenizer() -> Tokenizer:
    folder = model().folder
    assert folder is not None
    return Tokenizer(folder)


@cache
def traced() -> dict[str, Tensor]:
    """The outputs and named locals of every node in a forward pass over the prompt."""
    return trace(model(), tokenizer().encode(PROMPT), named_locals=True)


@cache
def shapes(node: str) -> dict[str, list[int]]:
    """The shapes of a mixer's locals in the 397B model, for the same prompt. They come from meta
    tensors."""
    config = replace(Config.published(PUBLISHED), num_experts=1, num_experts_per_tok=1)
    large = lay_out(replace(config, num_hidden_layers=4, layer_types=config.layer_types[:4]))
    T = len(tokenizer().encode(PROMPT))
    meta = torch.device("meta")
    state = Cache.empty(large.config, torch.bfloat16, meta).layers[int(node.split(".")[1])]
    found: dict[str, Tensor] = {}
    mixer = large.get_submodule(node).to(torch.bfloat16)
    x = torch.empty(1, T, config.hidden_size, dtype=torch.bfloat16, device=meta)
    assert isinstance(state, DeltaState | KVCache)
    with recording({node: mixer}, found, named_locals=True), torch.inference_mode():
        mixer(x, state)
    return {name: list(tensor.shape) for name, tensor in found.items()}


def line_of(file: str, function: str, name: str) -> tuple[int, str]:
    """The number and text of the last line that assigns `name` in a function of the reference.
    InputError if there is no such function or line."""
    source = (ROOT / file).read_text(encoding="utf-8")
    owner, _, method = function.rpartition(".")
    scope: ast.AST | None = ast.parse(source)
    for part in filter(None, (owner, method)):
        scope = next((n for n in ast.walk(scope) if getattr(n, "name", None) == part), None)
        if scope is None:
            raise InputError(f"{file}: there is no {function}")
    lines = [
        node.lineno
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign)
        for target in ast.walk(ast.Tuple(node.targets, ast.Load()))
        if isinstance(target, ast.Name) and target.id == name
    ]
    if not lines:
        raise InputError(f"{file}: {function} binds no {name!r}")
    return lines[-1], source.splitlines()[lines[-1] - 1].strip()


def size(x: Tensor) -> str:
    """The root mean square (RMS) of a tensor, as text."""
    return f"{x.double().square().mean().sqrt():.3f}"


def steps(node: str, file: str, function: str, names: list[str]) -> str:
    """A Markdown table of a mixer's locals: the line of code, the shapes, and the RMS."""
    rows = ["| name | line | at 397B | here | size |", "|---|---|---|---|---|"]
    for name in names:
        number, text = line_of(file, function, name)
        code = text.partition("  #")[0].replace("|", "\\|")
        here = traced()[f"{node}:{name}"]
        large = shapes(node)[f"{node}:{name}"]
        rows.append(
            f"| `{name}` | `{file}:{number}` `{code}` | {large} | {list(here.shape)} | {size(here)} |"
        )
    return "\n".join(rows)


def delta_net() -> str:
    names = ["rows", "mixed", "z", "beta", "g", "v", "qk", "q", "read"]
    return steps(DELTA, "reference/deltanet.py", "GatedDeltaNet.forward", names)


def attention() -> str:
    names = ["q_and_gate", "q_raw", "v", "cos", "q", "keys", "attended"]
    return steps(ATTENTION, "reference/attention.py", "GatedAttention.forward", names)


def stream() -> str:
    ids = tokenizer().encode(PROMPT)
    named = ", ".join(f"{i} ({tokenizer().decode([i])!r})" for i in ids)
    rows = [
        f"The prompt is {len(ids)} tokens: {named}.",
        "",
        "| after | size of the residual stream |",
        "|---|---|",
        f"| `embed_tokens` | {size(traced()['embed_tokens'])} |",
    ]
    for i, kind in enumerate(model().config.layer_types):
        rows.append(
            f"| `layers.{i}` ({kind.replace('_', ' ')}) | {size(traced()[f'layers.{i}'])} |"
        )
    rows.append(f"| `norm` | {size(traced()['norm'])} |")
    best = traced()["lm_head"][0, -1].float().softmax(-1).sort(descending=True)
    top = zip(best.indices[:3].tolist(), best.values[:3].tolist(), strict=True)
    rows += ["", "The likeliest next tokens: " + ", ".join(
        f"{tokenizer().decode([i])!r} ({p:.3f})" for i, p in top) + "."]  # fmt: skip
    return "\n".join(rows)


def experts() -> str:
    config, large = model().config, Config.published(PUBLISHED)
    chosen, weights = traced()["layers.3.mlp.gate.0"][-1], traced()["layers.3.mlp.gate.1"][-1]
    pairs = zip(chosen.tolist(), weights.tolist(), strict=True)
    named = " and ".join(f"{e} with weight {w:.3f}" for e, w in pairs)
    gate = traced()["layers.3.mlp:shared_gate"]
    routed = size(traced()["layers.3.mlp.experts"][-1])
    shared = size(traced()["layers.3.mlp.shared_expert"][-1])
    return (
        f"In layer 3 the last token goes to experts {named}: {config.num_experts_per_tok} of "
        f"{config.num_experts}; the 397B takes {large.num_experts_per_tok} of {large.num_experts}. "
        f"Their sum has size {routed}. The shared expert's output has size {shared} and is "
        f"multiplied by its gate, {gate[-1].item():.3f}."
    )


def drafting() -> str:
    """The first two decode rounds after the prompt."""
    ids = tokenizer().encode(PROMPT)
    with torch.inference_mode():
        cache = model().new_cache()
        hidden = prefill(model(), ids, cache, chunk=64, draft=True)
        token = int(model().lm_head(hidden)[0, 0].argmax())
        decoder = Decoder(
            model(),
            cache,
            token=token,
            hidden=hidden,
            depth=3,
            sampling=Sampling(),
            stop=frozenset(),
        )
        lines = [f"Prefill gives the first token, {tokenizer().decode([token])!r}."]
        for number in ("first", "second"):
            before = list(decoder.stats.accepted)
            fresh = decoder.round(100)
            accepted = sum(decoder.stats.accepted) - sum(before)
            text = tokenizer().decode([t for t, _ in fresh])
            tokens = "1 token" if len(fresh) == 1 else f"{len(fresh)} tokens"
            lines.append(
                f"The {number} round verifies four rows, accepts {accepted} of 3 drafts and gives "
                f"{tokens}, {text!r}; the cache then holds {cache.length} positions."
            )
    return "\n".join(lines)


# Answers of the exercises: what the debugger prints at the place that the page names.
ANSWERS: dict[str, Callable[[], str]] = {
    "decay": lambda: f"{traced()[f'{DELTA}:g'][0, -1, 0].exp().item():.3f}",
    "beta": lambda: f"{traced()[f'{DELTA}:beta'][0, -1, 0].item():.3f}",
    "gate": lambda: f"{torch.sigmoid(traced()[f'{ATTENTION}:gate'].float()).mean().item():.3f}",
    "keys": lambda: f"{list(traced()[f'{ATTENTION}:keys'].shape)}",
    "choice": lambda: f"{traced()['layers.3.mlp.gate.0'][-1].tolist()}",
    "norm": lambda: f"{model().layers[0].input_layernorm.weight.float().mean().item():.3f}",  # pyright: ignore
}
BLOCKS: dict[str, Callable[[], str]] = {
    "stream": stream, "delta_net": delta_net, "attention": attention, "experts": experts,
    "drafting": drafting,
    **{f"answer_{name}": answer for name, answer in ANSWERS.items()},
}  # fmt: skip


def same(said: str, computed: str) -> bool:
    """Whether two texts are equal, apart from numbers within 2% or 0.005 of each other."""
    if NUMBER.sub("#", said).split() != NUMBER.sub("#", computed).split():
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(computed), strict=True)
    return all(abs(float(a) - float(b)) <= max(0.005, 0.02 * abs(float(b))) for a, b in pairs)


def main(args: argparse.Namespace) -> int:
    blocks = {name: block() for name, block in BLOCKS.items()}
    if not (args.write or args.check):
        for name, text in blocks.items():
            print(f"{name}\n\n{text}\n")
        return 0
    page = PAGE.read_text(encoding="utf-8")
    marked = {name: text for _, name, text, _ in MARKED.findall(page)}
    if set(marked) != set(blocks):
        raise InputError(f"{PAGE.name} has blocks {sorted(marked)}; expected {sorted(blocks)}")
    if args.write:
        fresh = MARKED.sub(lambda m: f"{m[1]}{blocks[m[2]]}\n{m[4]}", page)
        with whole(PAGE) as part:
            part.write_text(fresh, encoding="utf-8")
        return 0
    wrong = [name for name, text in marked.items() if not same(text, blocks[name])]
    for name in wrong:
        print(
            f"{PAGE.name}, {name}:\n{blocks[name]}\nis expected, not\n{marked[name]}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    run(build_parser(), main)
