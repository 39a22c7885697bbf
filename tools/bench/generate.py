"""Compare prefill and decode with the transformers library: same weights, same prompts, in turn.

The time of decoding is that of a whole continuation without the time of its first token.
"""

import argparse
import statistics

import torch

from qwen35.cli import Parser, at_least_one, at_least_two, at_least_zero
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.generation import Generation, check_limits, prefill
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
    add("--dtype", choices=DTYPES,
        help="let both sides compute in this dtype (default: the checkpoint's own)")  # fmt: skip
    add("--prefill-tokens", type=at_least_one, default=2048, metavar="N",
        help="time the prefill of N tokens (default: 2048)")  # fmt: skip
    add("--prompt-tokens", type=at_least_one, default=64, metavar="N",
        help="continue the first N tokens of each document (default: 64)")  # fmt: skip
    add("--new-tokens", type=at_least_two, default=128, metavar="N",
        help="generate N tokens in each continuation (default: 128)")  # fmt: skip
    add("--prompts", type=at_least_one, default=5, metavar="N",
        help="continue N documents of held-out text (default: 5)")  # fmt: skip
    add("--draft-tokens", type=at_least_zero, default=3, metavar="K",
        help="let our side draft K tokens in each round (default: 3)")  # fmt: skip
    add("--repeats", type=at_least_one, default=5, metavar="R",
        help="time each run R times (default: 5)")  # fmt: skip
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
    documents = sorted(text.split(f"\n{SEPARATOR}\n"), key=len, reverse=True)[: args.prompts]
    start = tokenizer.encode(SEPARATOR)
    prompts = [(start + tokenizer.encode(d))[: args.prompt_tokens] for d in documents]
    config = Config.from_file(folder / "config.json")
    for ids in (all_ids[: args.prefill_tokens], *prompts):
        config.check_prompt(ids, args.new_tokens)
    check_limits(config, args.draft_tokens, None, None)
    model = load(folder, dtype=DTYPES.get(args.dtype))
    theirs = in_transformers(folder, model.embed_tokens.weight.dtype)
    long_prompt = torch.tensor([all_ids[: args.prefill_tokens]])

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
    ratios = [row["times_faster"] for row in rows[2:] if row.get("times_faster")]  # decode alone
    mean = statistics.geometric_mean(ratios) if ratios else None
    rows.append({"name": "decode, geometric mean", "times_faster": mean})
    described = {
        "model": args.model,
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        "prefill_tokens": args.prefill_tokens,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "draft_tokens": args.draft_tokens,
        "tokens_per_forward": tokens / forwards,
        "repeats": args.repeats,
    }
    report.emit("generate", described, rows, only_json=args.json)
    return 0


def _rows(
    op: str, seconds: dict[str, list[float]], tokens: int, same_tokens: int | None = None
) -> list[report.Row]:
    """The rows of both sides, with the ratio of their medians. same_tokens: the number of equal ids
    before the first that differs. A difference of two times that the noise has made zero or negative
    gives neither a speed nor a ratio: they are None."""
    rows = []
    for name, values in seconds.items():
        spread = report.spread(values)
        ms = spread["median_ms"]
        speed = {"tokens_per_s": tokens / ms * 1e3 if ms > 0 else None}
        rows.append({"name": f"{op}, {name}"} | spread | speed)
    ours, theirs = (row["median_ms"] for row in rows)
    rows[0]["times_faster"] = theirs / ours if min(ours, theirs) > 0 else None
    if same_tokens is not None:
        rows[0]["same_tokens"] = same_tokens
    return rows


def _same_start(ours: list[int], theirs: list[int]) -> int:
    pairs = zip(ours, theirs, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours))
