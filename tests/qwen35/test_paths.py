"""`--path` and `--swap`: what runs, what is refused before a weight is read, and what is said."""

import json
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fast import hip, hip_compiler
from fast.shapes import check_shapes
from qwen35.config import PUBLISHED, Config
from qwen35.errors import InputError
from qwen35.generate import build_parser, main
from qwen35.load import TINY, load
from qwen35.paths import TRITON, choose_path, unfit_triton
from qwen35.step_decoder import runs_as_step
from qwen35.swap import replaced
from tests.support.command import Cli, in_process
from tools.convert import Options, convert
from tools.gfx950.target import emulate

TINY_CONFIG = Config.from_file(TINY / "config.json")
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NO_CARD = "the fast path runs on gfx950 and sm_90; this is cpu"


class Doubled(nn.Module):
    """A feed-forward that gives twice what the reference's gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @classmethod
    def from_reference(cls, module: nn.Module) -> "Doubled":
        return cls(module)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.module(x)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return in_process(build_parser, main, capsys)


def test_on_a_cpu_auto_is_the_reference_and_says_nothing(cli: Cli):
    status, out, err = cli("In the", "--max-new-tokens", 3, "--json")
    assert status == 0 and json.loads(out)["path"] == "reference"
    assert "fast path" not in err


def test_fast_on_a_cpu_is_refused_in_one_line(cli: Cli):
    status, out, err = cli("In the", "--path", "fast")
    assert (status, out) == (2, "") and err == f"python -m qwen35.generate: {NO_CARD}\n"


def test_auto_says_why_it_is_the_reference():
    choice = choose_path("auto", TINY_CONFIG, CPU, torch.bfloat16)
    assert (choice.name, choice.reason, choice.swaps) == ("reference", NO_CARD, [])
    with pytest.warns(UserWarning, match=f"the reference path runs: {NO_CARD}"):
        load("tiny", path="auto")
    with pytest.raises(InputError, match="path 'quick'; expected auto, fast, reference"):
        choose_path("quick", TINY_CONFIG, CPU, torch.bfloat16)


def test_on_a_card_shapes_and_dtype_decide(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qwen35.paths.target_of", lambda device: "sm_90")
    assert choose_path("auto", TINY_CONFIG, CPU, torch.bfloat16).name == "fast"
    with pytest.raises(
        InputError, match=r"the fast path computes in bfloat16; the dtype is torch.f"
    ):
        choose_path("fast", TINY_CONFIG, CPU, torch.float32)
    odd = replace(TINY_CONFIG, linear_value_head_dim=24)
    with pytest.raises(InputError, match="linear_value_head_dim = 24; the fast path takes powers"):
        choose_path("fast", odd, CPU, torch.bfloat16)
    assert "linear_value_head_dim = 24" in choose_path("auto", odd, CPU, torch.bfloat16).reason


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size_is_taken(name: str):
    check_shapes(Config.published(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 96}, "head_dim = 96; the fast path takes powers of two from 16 to 256"),
        (
            {"linear_key_head_dim": 512},
            "linear_key_head_dim = 512; the fast path takes powers of two",
        ),
        (
            {"linear_conv_kernel_dim": 12},
            "linear_conv_kernel_dim = 12; the fast path takes at most 9",
        ),
        ({"num_experts_per_tok": 20}, "num_experts_per_tok = 20; the fast path takes at most 16"),
        ({"hidden_size": 264}, "hidden_size = 264; the fast path takes multiples of 16"),
        (
            {"moe_intermediate_size": 40},
            "moe_intermediate_size = 40; the fast path takes multiples",
        ),
    ],
)
def test_a_shape_that_no_kernel_takes_is_named(change: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        check_shapes(replace(TINY_CONFIG, **change))


def test_a_swapped_node_runs_and_is_named(cli: Cli):
    where = f"layers.*.mlp={__name__}:Doubled"
    plain = json.loads(cli("In the", "--max-new-tokens", 4, "--json")[1])
    status, out, err = cli("In the", "--max-new-tokens", 4, "--json", "--swap", where)
    found = json.loads(out)
    assert status == 0 and found["token_ids"] != plain["token_ids"]
    assert found["swaps"] == [f"layers.{i}.mlp={__name__}:Doubled" for i in range(8)]
    assert "0 of 8 layers run on the fast path; 1 pattern swapped" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers.3.mlp", "--swap 'layers.3.mlp'; expected PATTERN=MODULE:CLASS"),
        ("layers.3.mlp=nowhere:X", "No module named 'nowhere'"),
        ("layers.3.mlp=reference.moe:X", "reference.moe has no X"),
        ("layers.3.mlp=reference.moe:MLP", "MLP has no from_reference"),
        ("layer.3.mlp=fast.moe:MLP", "pattern 'layer.3.mlp' matches no node; the nearest are"),
    ],
)
def test_a_swap_that_cannot_be_is_one_line(cli: Cli, text: str, message: str):
    status, out, err = cli("In the", "--swap", text)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


def test_a_layer_in_which_a_node_is_swapped_stays_the_references(monkeypatch: pytest.MonkeyPatch):
    """The other layers are fast; rounds then do not run as one graph."""
    for module in ("qwen35.paths", "fast.layer", "fast.mtp"):
        monkeypatch.setattr(f"{module}.target_of", lambda device: "gfx950")
    model = load("tiny", path="fast", swaps=[("layers.3.mlp", Doubled)])
    names = replaced(model)
    assert names[0] == "layers.0=fast.layer:DecoderLayer"
    assert f"layers.3.mlp={__name__}:Doubled" in names and len(names) == 9
    assert not runs_as_step(model, 3)


def test_prefill_of_a_fast_model_is_at_most_twice_as_far_off_as_the_references(
    monkeypatch: pytest.MonkeyPatch,
):
    """Every layer's launches for 64 rows and for 9, as gfx950 code in the emulator."""
    for module in ("qwen35.paths", "fast.layer", "fast.mtp"):
        monkeypatch.setattr(f"{module}.target_of", lambda device: "gfx950")
    monkeypatch.setattr("fast.prefill.layer.run", partial(emulate, races=False))
    slow, quick = load("tiny"), load("tiny", path="fast")
    wide = load("tiny", dtype=torch.float32)
    ids = torch.arange(100, 164)[None]
    with torch.inference_mode():
        truth, theirs, ours = (
            model.lm_head(model(ids, model.new_cache())).float() for model in (wide, slow, quick)
        )
        short = quick(ids[:, :9], quick.new_cache())
        again = quick(ids[:, :9], quick.new_cache())
    assert (ours - truth).norm() <= 2 * (theirs - truth).norm()
    assert torch.equal(short, again)


def test_the_tools_name_the_embedded_model(tmp_path: Path):
    """`load` takes a folder or a name; a path of neither is one line."""
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "x" / "y" / "z", path="reference")


@pytest.mark.parametrize(
    ("version", "fits"),
    [("3.6.0", True), ("3.7.1+git0a1b", True), ("3.5.1", False), ("3.8.0", False), ("4.0", False)],
)
def test_a_triton_that_the_kernels_are_not_checked_with_is_named(
    version: str, fits: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("triton.__version__", version)
    line = unfit_triton()
    assert (line == "") is fits
    assert fits or (version in line and "3.6 and later, below 3.8" in line)


def test_the_installed_extra_brings_a_triton_that_fits():
    least, until = (".".join(map(str, bound)) for bound in TRITON)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["fast"] == [f"triton>={least},<{until}"]
    assert unfit_triton() == ""  # of the version that the tests pin


def test_the_fast_path_warns_of_another_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qwen35.paths.target_of", lambda device: "sm_90")
    monkeypatch.setattr("triton.__version__", "3.9.0")
    with pytest.warns(UserWarning, match="Triton 3.9.0 is installed"):
        assert choose_path("fast", TINY_CONFIG, CPU, torch.bfloat16).name == "fast"


# ---- the kernels of the experts


def test_hip_kernels_without_their_card_are_refused_in_one_line(cli: Cli):
    """They are refused before weights are read, also where `auto` would take the reference."""
    for path, message in (
        ("auto", "moe_kernel hip runs on gfx950; this is cpu"),
        ("fast", "moe_kernel hip runs on gfx950; this is cpu"),
        ("reference", "moe_kernel hip is of the fast path; the path is reference"),
    ):
        status, out, err = cli("In the", "--moe-kernel", "hip", "--path", path)
        assert (status, out, err) == (2, "", f"python -m qwen35.generate: {message}\n")


@pytest.fixture
def mi355x(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the card, whose device is the CPU."""
    for module in ("qwen35.paths", "fast.layer", "fast.mtp"):
        monkeypatch.setattr(f"{module}.target_of", lambda device: "gfx950")
    monkeypatch.setattr(hip, "runtime", lambda: None)


@pytest.mark.usefixtures("mi355x")
def test_what_the_hip_kernels_need(monkeypatch: pytest.MonkeyPatch):
    def refused(config: Config = TINY_CONFIG, kernel: str = "hip") -> str:
        with pytest.raises(InputError) as caught:
            choose_path("auto", config, CPU, torch.bfloat16, kernel)
        return str(caught.value)

    assert choose_path("auto", TINY_CONFIG, CPU, torch.bfloat16, "hip").moe_kernel == "hip"
    assert refused(kernel="cuda") == "moe_kernel 'cuda'; expected triton or hip"
    dense = Config.published("27B")
    message = "the HIP kernels are of a mixture of experts; this model is dense"
    assert refused(dense) == message
    assert "hidden size 1152; expected a multiple" in refused(
        replace(TINY_CONFIG, hidden_size=1152)
    )
    odd = replace(TINY_CONFIG, shared_expert_intermediate_size=48)
    assert "a shared expert of intermediate size 48; expected" in refused(odd)
    with pytest.raises(InputError, match=r"down_proj: torch\.bfloat16; moe_kernel hip takes"):
        load("tiny", moe_kernel="hip", path="fast")

    def missing(text: str) -> None:
        raise InputError(text)

    monkeypatch.setattr(hip, "runtime", lambda: missing("HIP kernels need ROCm's runtime"))
    assert refused() == "HIP kernels need ROCm's runtime"
    monkeypatch.setattr(hip_compiler, "find", lambda: missing("no compiler for HIP"))
    assert refused() == "no compiler for HIP"


@pytest.mark.parametrize("name", [n for n in PUBLISHED if Config.published(n).num_experts])
@pytest.mark.usefixtures("mi355x")
def test_every_published_mixture_of_experts_is_taken(name: str):
    choice = choose_path("fast", Config.published(name), CPU, torch.bfloat16, "hip")
    assert choice.moe_kernel == "hip"


@pytest.mark.usefixtures("mi355x")
def test_a_model_with_hip_kernels_says_so(tmp_path: Path):
    """The experts of its MTP head are in bf16, and take Triton's."""
    convert(TINY, tmp_path / "mxfp4", Options("mxfp4"))
    model = load(tmp_path / "mxfp4", moe_kernel="hip", path="auto")
    blocks = [layer.feed_forward for layer in model.layers]  # pyright: ignore (fast layers)
    assert {(block.gate.kernel, block.experts.kernel) for block in blocks} == {("hip", "hip")}
    assert model.mtp.layer.feed_forward.experts.kernel == "triton"  # pyright: ignore (a fast one)
    assert str(model.layers).count("MXFP4, HIP, gfx950") > 0
