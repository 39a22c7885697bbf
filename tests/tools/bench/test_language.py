"""The perplexity of the embedded model in MXFP4, on text that it was not trained on."""

from pathlib import Path

from qwen35.load import TINY, load
from qwen35.tokenizer import Tokenizer
from tools.bench.language import HELDOUT, SEPARATOR, bits
from weights.convert import convert
from weights.output import Options


def perplexity(folder: Path, documents: list[str]) -> float:
    """The perplexity of a token, over documents that each start anew."""
    model, tokenizer = load(folder), Tokenizer(folder)
    start = tokenizer.encode(SEPARATOR)
    total = tokens = 0.0
    for document in documents:
        ids = start + tokenizer.encode(document)
        total += bits(model, ids)
        tokens += len(ids) - 1
    return 2 ** (total / tokens)


def test_experts_in_mxfp4_cost_less_than_two_percent(tmp_path: Path) -> None:
    """A tenth of the text that the README's figure was measured on; BF16 must not be matched exactly,
    or nothing was quantised."""
    documents = HELDOUT.read_text().split(f"\n{SEPARATOR}\n")[::10]
    convert(TINY, tmp_path / "mxfp4", Options("mxfp4"))
    before, after = (perplexity(folder, documents) for folder in (TINY, tmp_path / "mxfp4"))
    assert 1.0001 < after / before < 1.02
