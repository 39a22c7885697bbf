"""A NaN in a hidden state is an error that names the position and the node, at any drafting depth."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qwen35.cli import run
from qwen35.errors import InputError
from qwen35.finite import check_finite
from qwen35.generate import build_parser, main
from qwen35.generation import Generation
from qwen35.load import TINY, load
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer
from reference.model import Model
from tests.support.checkpoints import SINGLE, edit_tensors
from tests.support.command import in_process

PROMPT = Tokenizer(TINY).encode("In the beginning")


def generation(model: Model, *, depth: int = 0, temperature: float = 0.0) -> Generation:
    sampling = Sampling(temperature=temperature, seed=1)
    return Generation(model, PROMPT, 12, sampling, frozenset(), draft_tokens=depth)  # fmt: skip


class Embedding(nn.Embedding):
    """Gives NaN for one token."""

    broken = -1

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).masked_fill((ids == self.broken)[..., None], math.nan)


@pytest.mark.parametrize("number", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize(
    ("parameter", "node"),
    [
        ("layers.1.mlp.shared_expert.up_proj.weight", "layers.1.mlp.shared_expert.up_proj"),
        ("layers.3.self_attn.q_norm.weight", "layers.3.self_attn.q_norm"),
        ("norm.weight", "norm"),
    ],
)
def test_the_node_where_it_begins_is_named(parameter: str, node: str, number: float) -> None:
    model = load("tiny")
    with torch.no_grad():
        model.get_parameter(parameter).flatten()[3] = number
    with pytest.raises(InputError) as raised:
        list(generation(model))
    assert str(raised.value) == (
        f"position {len(PROMPT)}: the logits are NaN or infinite; "
        f"the first node that returns such a number is {node}"
    )


@pytest.mark.parametrize("depth", [0, 1, 3, 7])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_position_is_that_of_the_step(depth: int, temperature: float) -> None:
    """The tokens before it come out, whatever was drafted beside them."""
    expected = [token for token, _ in generation(load("tiny"), temperature=temperature)]
    at = next(i for i in range(2, 12) if expected[i] not in [*PROMPT, *expected[:i]])
    model = load("tiny")
    model.embed_tokens.__class__ = Embedding
    model.embed_tokens.broken = expected[at]
    run_of_it = generation(model, depth=depth, temperature=temperature)
    got: list[int] = []
    position = len(PROMPT) + at + 1  # of the token whose logits come from the broken one
    with pytest.raises(InputError, match=rf"^position {position}: .* is embed_tokens$"):
        got.extend(token for token, _ in run_of_it)
    known = len(run_of_it.token_ids)
    assert run_of_it.token_ids == expected[:known]
    assert at - depth < known <= at + 1


def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    name = "model.language_model.layers.2.input_layernorm.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][0] = math.nan

    assert (folder / SINGLE).exists()
    edit_tensors(folder, spoil)
    with pytest.raises(SystemExit) as stop:
        run(build_parser(), main, ["In the beginning", "--model", str(folder), "--json"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.strip().splitlines()[-1].endswith("is layers.2.input_layernorm")


def test_one_request_of_several_fails_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token of the second prompt has NaN in its embedding: the first and the third have their text."""
    folder, requests = tmp_path / "model", tmp_path / "requests.jsonl"
    shutil.copytree(TINY, folder)
    prompts = [PROMPT, [*PROMPT, 1234], PROMPT[:2]]
    requests.write_text(
        "\n".join(json.dumps({"id": i, "prompt_ids": ids}) for i, ids in enumerate(prompts))
    )
    cli = in_process(build_parser, main, capsys)
    command = ["--model", folder, "--requests", requests, "--max-new-tokens", 3]
    whole = [json.loads(line) for line in cli(*command)[1].splitlines()]

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.language_model.embed_tokens.weight"][1234] = math.nan

    edit_tensors(folder, spoil)
    status, out, err = cli(*command)
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and "Traceback" not in err
    assert [line["id"] for line in found] == [0, 1, 2]
    for line, expected in ((found[0], whole[0]), (found[2], whole[2])):
        assert line["token_ids"] == expected["token_ids"] and "error" not in line
    assert found[1] == {
        "id": 1,
        "error": f"position {len(prompts[1])}: the logits are NaN or infinite; "
        "the first node that returns such a number is embed_tokens",
    }


@pytest.mark.parametrize("number", [math.nan, -math.nan, math.inf])
def test_one_such_number_is_enough(number: float) -> None:
    logits = torch.zeros(1000)
    check_finite(logits, 3, [1])
    check_finite(logits.index_fill(0, torch.tensor(5), -math.inf), 3, [1])  # a token left out
    for place in (0, 517, 999):
        with pytest.raises(InputError, match="position 3: the logits are NaN"):
            check_finite(logits.index_fill(0, torch.tensor(place), number), 3, [1])
