"""The claims of a `quantization_config`, and how they are compared with the tensors that are there."""

from typing import Any

import pytest

from qwen35.errors import InputError
from weights.quantization import EXCLUDED, LARGEST_BLOCK, Modules, Quantization, compare


def claim(**fields: Any) -> Quantization:
    found = Quantization.from_config({"quantization_config": {"quant_method": "fp8"} | fields})
    assert found is not None
    return found


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_where_a_claim_stands(key: str) -> None:
    """The outer one counts where there are two; an empty one is none."""
    inner, outer = {key: {"quant_method": "inner"}}, {key: {"quant_method": "outer"}}
    for document, method in ((outer | {"text_config": inner}, "outer"),
                             ({"text_config": inner}, "inner"),
                             ({key: {}, "text_config": inner}, "inner")):  # fmt: skip
        found = Quantization.from_config(document)
        assert found is not None and found.method == method
    for document in ({}, {key: None}, {key: {}, "text_config": None}, {"text_config": [key]}):
        assert Quantization.from_config(document) is None


def test_the_lists_of_all_clients_are_joined() -> None:
    found = claim(**{key: [key, "lm_head"] for key in EXCLUDED[1:]}, exclude=None)
    assert found.excluded == (EXCLUDED[1], "lm_head", *EXCLUDED[2:])
    assert (found.block, found.targets, found.method) == ((128, 128), ("Linear",), "fp8")
    groups = {
        "a": {"targets": ["x", "y"], "weights": {"block_structure": None}},
        "b": {"targets": ["y", "z"], "weights": {"block_structure": [32, 48]}},
        "c": "no group", "d": {"weights": "none"},
    }  # fmt: skip
    found = claim(config_groups=groups)
    assert (found.targets, found.block) == (("x", "y", "z"), (32, 48))
    assert claim(config_groups=groups, weight_block_size=[1, LARGEST_BLOCK]).block == (1, 65536)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        *(({"weight_block_size": block}, f"weight_block_size = {block!r}; expected [128, 128]")
          for block in ([128], [0, 1], [1, LARGEST_BLOCK + 1], [True, 1], [1.0, 1], "128", [1, 2, 3])),
        ({"ignore": "lm_head"}, "ignore = 'lm_head'; expected a list of names"),
        ({"exclude": ["a", 1]}, "exclude = ['a', 1]; expected a list of names"),
    ],
)  # fmt: skip
def test_a_bad_claim_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        claim(**fields)
    assert str(caught.value) == f"quantization_config: {words}"
    with pytest.raises(InputError, match=r"quantization_config = \['fp8'\]; expected an object"):
        Quantization.from_config({"quantization_config": ["fp8"]})


def test_modules_by_name_by_parent_by_glob_and_by_expression() -> None:
    listed = Modules(["model.language_model.layers.0", "lm_head", "*.gate", "re:.*up_pro.$"])
    for module in ("layers.0.mlp.down_proj", "model.layers.0", "lm_head", "model.layers.7.mlp.gate",
                   "layers.7.mlp.up_proj", "model.language_model.layers.7.mlp.up_proj"):  # fmt: skip
        assert module in listed, module
    for module in ("layers.01", "layers.7.mlp.gates", "layers.7.up_proj.x", "mtp.lm_head"):
        assert module not in listed, module
    anchored = Modules(["re:model.layers.1.x", "re:layers.2"])
    assert all(name in anchored for name in ("layers.1.x", "model.layers.1.x", "layers.2.y"))
    assert "model.layers.2.y" not in anchored
    with pytest.raises(InputError, match=r"quantization_config: '\(' cannot be read: "):
        Modules(["re:("])


def test_what_differs_from_a_claim_is_counted_by_kind() -> None:
    formats = {f"model.layers.{i}.mlp.{name}": found for i in (0, 1) for name, found in
               (("up", "fp8"), ("down", "plain"), ("gate", "fp8"))}  # fmt: skip
    problems, notes = compare(Quantization("fp8", ("*.gate",)), formats)
    assert problems == ["layers.*.mlp.gate (2 x): fp8, but quantization_config (fp8) excludes it"]
    assert notes == [
        "layers.*.mlp.down (2 x): not quantised, but quantization_config (fp8) does not exclude it"
    ]
    lines = [f"layers.*.mlp.{name} (2 x): fp8, but config.json has no quantization_config"
             for name in ("up", "gate")]  # fmt: skip
    assert compare(None, formats) == (lines, [])
    targets = Quantization("fp8", targets=("*.up", "*.gate"))
    assert compare(targets, formats) == ([], [])
    plain = dict.fromkeys(formats, "plain")
    assert compare(None, plain) == compare(Quantization("fp8"), {}) == ([], [])
    line = "quantization_config (fp8) is there, but no tensor is quantised"
    assert compare(Quantization("fp8"), plain) == ([line], [])
    problems, notes = compare(Quantization("odd"), formats)
    assert "quant_method = 'odd' is not compared with the tensors; they are read" in problems[0]
    assert (len(problems), notes) == (1, [])
