"""`tools.bench moe` and `router` without a GPU: their oracles, checks, floors and one-line errors."""

import argparse
import json
from collections.abc import Callable
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fast.moe
from fast import hip, hip_compiler
from fast.hip import HipLaunch
from fast.launch import Launch
from qwen35 import paths
from qwen35.cli import Parser, run
from qwen35.config import Config
from qwen35.errors import InputError
from reference.moe import Experts, Router
from tests.support.family import SHARED
from tools.bench import gpu, mixture, moe, router, step
from tools.bench.mixture import Case, Weights
from tools.gfx950.target import emulate
from weights import mxfp4

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def weights(generator: torch.Generator) -> Weights:
    return mixture.random_weights(8, 128, 64, generator)


def tiny() -> Config:
    """Eight experts of 128 -> 64 -> 128, two of which are chosen."""
    sizes: dict[str, Any] = {
        **{name: SHARED[name] for name in SHARED.keys() & {field.name for field in fields(Config)}},
        "hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
        "layer_types": ("linear_attention",) * 7 + ("full_attention",),
        "num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 1e7,
        "partial_rotary_factor": 0.25, "linear_num_key_heads": 1, "linear_num_value_heads": 1,
    }  # fmt: skip
    return Config(**sizes)


def as_reference(weights: Weights, dtype: torch.dtype) -> Experts:
    module = Experts(tiny()).to(dtype)
    for e, expert in enumerate(module):
        gate_up = mxfp4.dequantize(weights.gate_up[e], weights.gate_up_scale[e], dtype)
        gate, up = gate_up.chunk(2)
        down = mxfp4.dequantize(weights.down[e], weights.down_scale[e], dtype)
        for name, weight in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
            getattr(expert, name).weight.data = weight
    return module


@torch.no_grad()
def test_the_oracle_is_the_reference_in_float64(
    weights: Weights, generator: torch.Generator
) -> None:
    case = mixture.random_case(4, 128, 8, 2, generator)
    expected = as_reference(weights, torch.float64)(
        case.x.double(), case.experts.long(), case.shares.double()
    )
    torch.testing.assert_close(
        mixture.mixture(weights, case, torch.float64), expected, rtol=1e-12, atol=1e-15
    )


@torch.no_grad()
def test_the_yardstick_errs_as_the_reference_in_bfloat16(
    weights: Weights, generator: torch.Generator
) -> None:
    case = mixture.random_case(8, 128, 8, 2, generator)
    reference = as_reference(weights, torch.bfloat16)
    expected = reference(case.x, case.experts.long(), case.shares)
    rough = mixture.mixture(weights, case, torch.bfloat16)
    oracle = mixture.mixture(weights, case, torch.float64)
    assert rough.dtype == torch.bfloat16
    errors = [(t.double() - oracle).abs().max().item() for t in (rough, expected)]
    assert 0.5 < errors[0] / errors[1] < 2


def right(weights: Weights) -> mixture.Run:
    """The block without most of the roundings that the yardstick has."""
    return lambda case: mixture.mixture(weights, case, torch.float32).bfloat16()


def test_the_check_passes_what_is_right(weights: Weights, generator: torch.Generator) -> None:
    cases = mixture.check_cases(4, 128, 8, 2, generator)
    worst, failed = mixture.check(right(weights), weights, cases)
    assert not failed and 0 < worst <= 1.5


def scaled(case: Case) -> Case:
    return replace(case, shares=case.shares * 1.1)


def others(case: Case) -> Case:
    return replace(case, experts=(case.experts + 1) % 8)


@pytest.mark.parametrize("fault", [scaled, others])
def test_the_check_sees_a_wrong_result(
    weights: Weights, generator: torch.Generator, fault: Callable[[Case], Case]
) -> None:
    cases = mixture.check_cases(2, 128, 8, 2, generator)
    _, failed = mixture.check(lambda case: right(weights)(fault(case)), weights, cases)
    assert len(failed) == 4 and "inputs 0, 1 of 2 rows: error" in failed[0]


def test_the_check_sees_other_bits(weights: Weights, generator: torch.Generator) -> None:
    """The last place differs at every second launch, or in a row that is not alone."""
    cases = mixture.check_cases(2, 128, 8, 2, generator)[:1]
    launches = 0

    def moving(case: Case) -> Tensor:
        nonlocal launches
        launches += 1
        out = right(weights)(case)
        return out * (1 + 2**-7) if launches > 4 and launches % 2 else out

    _, failed = mixture.check(moving, weights, cases)
    assert any("other bits when launched again" in line for line in failed)

    def crowded(case: Case) -> Tensor:
        out = right(weights)(case)
        out[len(out) - 1, 0] *= 1 + 2**-7 * (len(out) > 1)
        return out

    _, failed = mixture.check(crowded, weights, cases)
    assert failed == ["inputs 0, 2 of 2 rows: a row alone has other bits"]
    assert mixture.check(crowded, weights, cases, bits=False)[1] == []


def test_bytes_by_hand(weights: Weights) -> None:
    """One expert of the 397B model is 6.685 MB: 4.25 bits an element."""
    assert mixture.expert_bytes(4096, 1024) == 3 * 4096 * 1024 * 17 // 32 == 6_684_672
    assert mixture.expert_bytes(128, 64) * 8 == sum(t.nbytes for t in weights.tensors)


def test_figures_by_hand() -> None:
    """4000 bytes at 2 GB/s take 2 us."""
    row = gpu.figures([4.0, 5.0, 3.0], [6.0, 4.5, 5.5], 4000, 2.0)
    assert (row["us"], row["us_again"], row["min_us"], row["max_us"]) == (4.0, 5.5, 3.0, 6.0)
    assert row["floor_us"] == pytest.approx(2.0)
    assert row["gb_s"] == pytest.approx(1.0)
    assert row["share_of_read"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("E", "each", "cache", "expected"), [(512, 835_584, 50 << 20, 1), (16, 835_584, 50 << 20, 24)]
)
def test_what_is_rotated_exceeds_the_cache(
    generator: torch.Generator, E: int, each: int, cache: int, expected: int
) -> None:
    sets, calls = mixture.rotation(4, 8, E, 10, each, cache, generator)
    assert sets == expected and len(calls) >= mixture.CALLS
    assert {at for at, _ in calls} == set(range(sets))
    hit = {(at, e) for at, case in calls for e in case.experts.flatten().tolist()}
    assert len(hit) * each >= 3 * cache


def test_distinct_experts_by_hand() -> None:
    def case(*rows: list[int]) -> Case:
        return Case(torch.zeros(len(rows), 1), torch.tensor(rows), torch.zeros(len(rows), 2))

    assert mixture.distinct([case([0, 1], [1, 2]), case([3, 4], [4, 3])]) == 2.5


def test_random_inputs(generator: torch.Generator) -> None:
    case = mixture.random_case(4, 16, torch.tensor([3, 5, 7]), 3, generator)
    assert case.x.dtype == torch.bfloat16 and case.experts.dtype == torch.int32
    assert all(sorted(row) == [3, 5, 7] for row in case.experts.tolist())
    torch.testing.assert_close(case.shares.sum(-1), torch.ones(4))


def test_plain_torch_is_right(weights: Weights, generator: torch.Generator) -> None:
    """The peer, as its rows are checked before they are timed."""
    pytest.importorskip("triton")
    from tools.bench.moe_peers import Plain

    plain = Plain(weights)
    cases = mixture.check_cases(4, 128, 8, 2, generator)
    _, failed = mixture.check(moe.as_run(plain.from_ids), weights, cases, bits=False)
    assert not failed


def test_a_peer_that_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise AttributeError("no such\nthing")

    moe.guarded("a peer", broken)
    assert capsys.readouterr().err == "a peer: AttributeError: no such thing\n"


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
def test_ours_passes_the_check_in_the_emulator_of_gfx950(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launches, whose buffers serve every call of one prepared case."""
    pytest.importorskip("triton")
    monkeypatch.setattr(moe, "run", emulate)
    monkeypatch.setattr(fast.moe, "target_of", lambda device: "gfx950")
    weights = mixture.random_weights(8, 128, 128, generator)
    cases = mixture.check_cases(3, 128, 8, 2, generator)
    prepare = moe.ours(weights)
    with torch.inference_mode():
        worst, failed = mixture.check(moe.as_run(prepare), weights, cases)
        call = prepare(cases[0])
        first = call().clone()
        assert torch.equal(call(), first)
    assert not failed and 0 < worst <= 2


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
def test_ours_in_hip_is_one_launch(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/fast/test_moe_hip.py runs such launches."""
    ran: list[Launch] = []
    monkeypatch.setattr(moe, "run", lambda launches, device: ran.extend(launches))
    monkeypatch.setattr(fast.moe, "target_of", lambda device: "gfx950")
    weights = mixture.random_weights(8, 128, 128, generator)
    case = mixture.random_case(3, 128, 8, 2, generator)
    assert moe.ours(weights, "hip")(case)().shape == (3, 128)
    (launch,) = ran
    assert isinstance(launch, HipLaunch) and launch.kernel.name == "moe"


SIZES = router.Sizes(16, 4, 32)


@pytest.mark.parametrize("sizes", [SIZES, router.Sizes(24, 3, 0)])
def test_our_router_passes_the_check_in_the_emulator_of_gfx950(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, sizes: router.Sizes
) -> None:
    """It passes with a shared expert and without. The one launch that is checked is the one that is
    timed."""
    pytest.importorskip("triton")
    monkeypatch.setattr(router, "run", emulate)
    weight = router.random_weight(sizes, 256, generator)
    x = torch.randn(3, 256, generator=generator).bfloat16()
    with torch.inference_mode():
        choose = router.ours(weight, sizes, "gfx950")
        worst, failed = router.check(choose, weight, x, sizes)
        assert not failed and 0 < worst <= 2
        timed = router.launch(weight, x, sizes, "gfx950")
        emulate([timed])
        assert torch.equal(timed.arguments["experts"], choose(x).experts)
    assert timed.name.split()[0] == "route"


def test_router_peers_are_right(generator: torch.Generator) -> None:
    weight = router.random_weight(SIZES, 64, generator)
    x = torch.randn(4, 64, generator=generator).bfloat16()
    for name, choose in router.peers(weight, SIZES).items():
        multiple, failed = router.check(choose, weight, x, SIZES, bits=False)
        assert not failed and multiple <= 2, name


def test_the_router_alone(generator: torch.Generator) -> None:
    """Without a shared expert there are only ids and weights. `reference.moe` chooses the same."""
    sizes = router.Sizes(8, 2, 0)
    weight = router.random_weight(sizes, 128, generator)
    reference = Router(tiny()).bfloat16()
    reference.weight.data = weight

    def choose(x: Tensor) -> router.Chosen:
        return router.Chosen(*reference(x), torch.empty(0), torch.empty(0))

    x = torch.randn(4, 128, generator=generator).bfloat16()
    assert router.check(choose, weight, x, sizes)[1] == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda out: out._replace(experts=out.experts.flip(-1)), "slot 0"),
        (lambda out: out._replace(experts=out.experts * 0), "experts [0, 0, 0, 0]"),
        (lambda out: out._replace(weights=out.weights * 1.1), "weights: error"),
        (lambda out: out._replace(hidden=out.hidden.flip(-1)), "hidden: error"),
        (lambda out: out._replace(shared_gate=1 - out.shared_gate), "shared_gate: error"),
    ],
)
def test_the_router_check_sees_faults(
    generator: torch.Generator, fault: Callable[[router.Chosen], router.Chosen], words: str
) -> None:
    weight = router.random_weight(SIZES, 64, generator) * 4
    x = torch.randn(2, 64, generator=generator).bfloat16()
    choose = next(iter(router.peers(weight, SIZES).values()))
    _, failed = router.check(lambda x: fault(choose(x)), weight, x, SIZES, bits=False)
    assert failed and words in failed[0]


def test_ids_may_trade_places_within_one_unit() -> None:
    """1 and 1 + 2^-7 are neighbours in bf16; 1 and 1 + 2^-6 are not."""
    logits = torch.tensor([[1 + 2**-7, 1.0, 0.0]], dtype=torch.float64)
    swapped = torch.tensor([[1, 0]])
    assert router.last_place(logits[0, :2]).tolist() == [2**-7, 2**-7]
    assert router.wrong_ids(swapped, logits) == []
    logits[0, 0] = 1 + 2**-6
    assert len(router.wrong_ids(swapped, logits)) == 1


class NoGraph:
    """Runs the calls, and takes as many microseconds as there are."""

    launches = None

    def __init__(self, calls: list[Callable[[], Tensor]]) -> None:
        self.calls = calls
        for call in calls:
            call()

    def microseconds(self, repeats: int) -> list[float]:
        return [float(len(self.calls))] * repeats


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The 397B model's sizes made small, a cache of 1 KB, and no graphs."""
    monkeypatch.setattr(mixture, "HIDDEN", 128)
    monkeypatch.setattr(mixture, "INTERMEDIATE", 128)
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 1024)
    monkeypatch.setattr(gpu, "Graph", NoGraph)
    return argparse.Namespace(
        tp=[1], rows=2, experts=8, top_k=2, repeats=3, moe_kernel="triton", no_peers=False
    )


def test_rows_of_the_experts(
    small: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong peer has no time but an error, one that fails no row; ours has all figures."""

    def peers(weights: Weights) -> dict[str, moe.Prepare]:
        def broken(case: Case) -> Callable[[], Tensor]:
            raise RuntimeError("broken")

        return {
            "wrong": lambda case: lambda: right(weights)(scaled(case)),
            "broken": broken,
            "good": lambda case: lambda: right(weights)(case),
        }

    monkeypatch.setattr(moe, "ours", lambda weights, _: lambda case: lambda: right(weights)(case))
    monkeypatch.setattr(moe, "peers", peers)
    rows, failed = moe.at_size(1, small, torch.device("cpu"), 1000.0)
    assert not failed and capsys.readouterr().err == "broken: RuntimeError: broken\n"
    ours, wrong, good = rows
    assert [row["name"] for row in rows] == ["ours", "wrong", "good"]
    assert "error" in wrong and "us" not in wrong and good["us"] == ours["us"] == 8.0
    assert list(ours) == [
        "name", "tp", "us", "us_again", "min_us", "max_us", "floor_us", "gb_s", "share_of_read",
        "err_x_bf16", "launches",
    ]  # fmt: skip


def test_wrong_experts_are_not_timed(
    small: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        moe, "ours", lambda weights, _: lambda case: lambda: right(weights)(scaled(case))
    )
    rows, failed = moe.at_size(1, small, torch.device("cpu"), 1000.0)
    assert not rows and failed[0].startswith("TP 1: inputs 0, 1 of 2 rows: error")


def test_rows_of_the_router(small: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(weight: Tensor, sizes: router.Sizes, target: str) -> router.Choose:
        """One row at a time, so that its bits are its own."""
        whole = next(iter(router.peers(weight, sizes).values()))

        def choose(x: Tensor) -> router.Chosen:
            rows = [whole(x[m : m + 1]) for m in range(len(x))]
            return router.Chosen(*(torch.cat(tensors) for tensors in zip(*rows, strict=True)))

        return choose

    monkeypatch.setattr(router, "ours", ours)
    monkeypatch.setattr(router, "launch", lambda *_: lambda: None)
    rows, failed = router.at_size(1, small, torch.device("cpu"), "sm_90", 1000.0)
    assert not failed and len(rows) == 4
    assert all(row["us"] == 16.0 and row["err_x_bf16"] <= 2 for row in rows)
    moved = (8 + 1 + 2 * 128) * 128 * 2
    assert rows[0]["floor_us"] == pytest.approx(moved / 1000 * 1e-3)


def command(
    capsys: pytest.CaptureFixture[str], op: ModuleType, *arguments: object
) -> tuple[int, str, str]:
    parser = Parser("bench", "")
    parser.add_argument("--json", action="store_true")
    op.add_arguments(parser)
    with pytest.raises(SystemExit) as ended:
        run(parser, op.main, [*map(str, arguments)])
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


@pytest.mark.parametrize("op", [moe, router])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tp", 1, 3), ["--tp 3", "1, 2, 4, 8"]),
        (("--tp", 0), ["--tp 0"]),
        (("--tp", 16), ["--tp 16"]),
        (("--rows", 0), ["--rows 0", "1 to 8"]),
        (("--rows", 9), ["--rows 9", "1 to 8"]),
        (("--top-k", 17), ["--top-k 17", "1 to 16"]),
        (("--experts", 4), ["--top-k 10", "1 to 4"]),
        (("--repeats", 0), ["--repeats 0"]),
        pytest.param((), ["gfx950", "sm_90", "cpu"], marks=needs_no_gpu),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], op: ModuleType, arguments: tuple[Any, ...], words: list[str]
) -> None:
    """It is refused before anything is measured, and so is a missing GPU."""
    status, out, err = command(capsys, op, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert not [word for word in words if word not in err], err


@pytest.mark.parametrize(
    ("op", "arguments"), [(moe, ("--tp", 8)), (step, ("--config", "tiny", "--tp", 1))]
)
def test_hip_kernels_without_their_card_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    op: ModuleType,
    arguments: tuple[Any, ...],
) -> None:
    """With the words of `qwen35.generate`; on the card, a missing compiler and a missing ROCm."""

    def missing() -> None:
        raise InputError("HIP kernels need ROCm's runtime")

    given = *arguments, "--moe-kernel", "hip"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = "bench: moe_kernel hip runs on gfx950; this is cpu\n"
    assert command(capsys, op, *given) == (2, "", message)
    monkeypatch.setattr(paths, "target_of", lambda device: "gfx950")
    monkeypatch.setattr(hip, "runtime", missing)
    assert command(capsys, op, *given) == (2, "", "bench: HIP kernels need ROCm's runtime\n")
    monkeypatch.setattr(hip_compiler, "find", missing)
    assert command(capsys, op, *given)[0] == 2


def test_the_document_names_the_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    args = argparse.Namespace(tp=[1], rows=4, experts=8, top_k=2, repeats=3, json=True)
    where = torch.device("cpu")
    gpu.emit("moe", args, "sm_90", where, 4680.0, [{"name": "ours"}], moe_kernel="triton")
    document = json.loads(capsys.readouterr().out)
    assert (document["device"], document["read_gb_s"]) == ("a GPU", 4680.0)
    assert document["config"]["target"] == "sm_90" and document["rows"] == [{"name": "ours"}]
    assert document["config"]["moe_kernel"] == "triton"
