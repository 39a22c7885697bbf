"""Compare prefill and decode with the transformers library: same weights, same prompts, in turn.

The time of decoding is that of a whole continuation without the time of its first token.
"""

import argparse
import statistics

import torch

from qwen35.cli import Parser, at_least_one, at_least_two, at_least_zero
from qwen35.errors import InputError
from qwen35.generation import Generation, prefill
from qwen35.load import DTYPES, load, locate
from qwen35.progress import steps
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer
from tools.bench import report
from tools.bench.language import HELDOUT, SEPARATOR
from tools.peer import in_transformers


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    parser.add_model()
    add("--dtype", choices=DTYPES, help="of both sides (default: the checkpoint's own)")
    add("--prefill-tokens", type=at_least_one, default=2048)
    add(
        "--prompt-tokens",
        type=at_least_one,
        default=64,
        help="of each text whose continuation is timed",
    )
    add("--new-tokens", type=at_least_two, default=128)
    add("--prompts", type=at_least_one, default=5, help="held-out documents that are continued")
    add("--draft-tokens", type=at_least_zero, default=3)
    add("--repeats", type=at_least_one, default=5)
    parser.set_defaults(threads=2)


def main(args: argparse.Namespace) -> int:
    folder = locate(args.model)
    tokenizer = Tokenizer(folder)
    text = HELDOUT.read_text(encoding="utf-8")
    all_ids = tokenizer.encode(text)
    if len(all_ids) < args.prefill_tokens:
        raise InputError(
            f"--prefill-tokens {args.prefill_tokens}; the held-out text has {len(all_ids)}"
        )
    model = load(folder, dtype=DTYPES.get(args.dtype))
    theirs = in_transformers(folder, model.embed_tokens.weight.dtype)
    long_prompt = torch.tensor([all_ids[: args.prefill_tokens]])
    documents = sorted(text.split(f"\n{SEPARATOR}\n"), key=len, reverse=True)[: args.prompts]
    start = tokenizer.encode(SEPARATOR)
    prompts = [(start + tokenizer.encode(d))[: args.prompt_tokens] for d in documents]

    def our_prefill() -> None:
        with torch.inference_mode():
            hidden = prefill(
                model, long_prompt[0].tolist(), model.new_cache(), chunk=2048, draft=False
            )
            model.lm_head(hidden)

    def their_prefill() -> None:
        with torch.inference_mode():
            theirs(long_prompt, logits_to_keep=1, use_cache=True)

    rows = _rows("prefill", report.alternate(
        {"ours": our_prefill, "transformers": their_prefill}, args.repeats
    ), args.prefill_tokens)  # fmt: skip

    forwards = tokens = 0
    for number, ids in enumerate(steps(prompts, "prompts")):
        # The time of a run with one new token is subtracted, so that only decode is timed.
        def ours(new: int, ids: list[int] = ids) -> Generation:
            generation = Generation(
                model, ids, new, Sampling(vocab=tokenizer.size), frozenset(), args.draft_tokens
            )
            for _ in generation:
                pass
            return generation

        def other(new: int, ids: list[int] = ids) -> torch.Tensor:
            with torch.inference_mode():
                return theirs.generate(
                    torch.tensor([ids]), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                )[0, len(ids) :]  # fmt: skip

        generation = ours(args.new_tokens)
        forwards += generation.draft.forwards
        tokens += generation.draft.tokens
        same = _same_start(generation.token_ids, other(args.new_tokens).tolist())
        seconds = report.alternate(
            {
                "ours": lambda ours=ours: ours(args.new_tokens),
                "transformers": lambda other=other: other(args.new_tokens),
                "ours, first token": lambda ours=ours: ours(1),
                "transformers, first token": lambda other=other: other(1),
            },
            args.repeats,
        )
        decode = {
            name: [
                a - b for a, b in zip(seconds[name], seconds[f"{name}, first token"], strict=True)
            ]
            for name in ("ours", "transformers")
        }
        rows += _rows(f"decode {number + 1}", decode, args.new_tokens - 1, same_tokens=same)
    ratios = [row["times_faster"] for row in rows if "times_faster" in row]
    mean = statistics.geometric_mean(ratios[1:])  # without the prefill's
    rows.append({"name": "decode, geometric mean", "times_faster": mean})
    config = {
        "model": args.model,
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        "prefill_tokens": args.prefill_tokens,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "draft_tokens": args.draft_tokens,
        "tokens_per_forward": tokens / forwards,
        "repeats": args.repeats,
    }
    report.emit("generate", config, rows, only_json=args.json)
    return 0


def _rows(
    op: str, seconds: dict[str, list[float]], tokens: int, same_tokens: int | None = None
) -> list[report.Row]:
    """The rows of both sides, with the ratio of their medians. same_tokens: the number of equal ids
    before the first that differs."""
    rows = []
    for name, values in seconds.items():
        spread = report.spread(values)
        speed = {"tokens_per_s": tokens / spread["median_ms"] * 1e3}
        rows.append({"name": f"{op}, {name}"} | spread | speed)
    rows[0]["times_faster"] = rows[1]["median_ms"] / rows[0]["median_ms"]
    if same_tokens is not None:
        rows[0]["same_tokens"] = same_tokens
    return rows


def _same_start(ours: list[int], theirs: list[int]) -> int:
    pairs = zip(ours, theirs, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours))
