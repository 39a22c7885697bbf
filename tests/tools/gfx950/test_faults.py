"""Faults planted in the emulator itself: a kernel or an instruction's check must find each."""

import inspect
import textwrap
from contextlib import contextmanager

import pytest

pytest.importorskip("triton")
pytest.importorskip("tinygrad")

from tests.support.gfx950_runs import check_vector
from tests.tools.gfx950.test_instructions import check_division, check_exec, check_lanes
from tests.tools.gfx950.test_kernels import SAMPLES, run_sample
from tools.gfx950 import (
    access,
    converts,
    lanes,
    matrix,
    memory,
    target,
    vector,
    vector_converts,
    vector_ops,
    waves,
)
from tools.gfx950.assembly import EmulatorError
from tools.gfx950.emulator import Kernel
from tools.gfx950.registry import BUILDERS

CHECKS = {"check_division": check_division, "check_exec": check_exec, "check_lanes": check_lanes}


@contextmanager
def fault(module, where: str, old: str, new: str):
    """While the block runs, a piece of the emulator's source reads `new` instead of `old`.

    where: a function, a Class.method, or "" for a `define(...)` that `old` is a line of.
    """
    before = dict(BUILDERS)
    if where:
        owner, _, name = where.rpartition(".")
        place = getattr(module, owner) if owner else module
        source = textwrap.dedent(inspect.getsource(getattr(place, name)))
    else:
        place, name, source = module, "BUILDERS", inspect.getsource(module)
    assert old in source, f"{where} has no {old!r}: the fault needs to be rewritten"
    kept = getattr(place, name, None)
    namespace = module.__dict__ if not where or place is module else dict(module.__dict__)
    try:
        exec(source.replace(old, new) if where else new, namespace)
        if place is not module:
            setattr(place, name, namespace[name])
        yield
    finally:
        BUILDERS.clear()
        BUILDERS.update(before)
        if where:
            setattr(place, name, kept)


FAULTS = {
    "nibbles swapped": (
        converts,
        "widen_pair",
        "[shift, shift + bits]",
        "[shift + bits, shift]",
        "v_cvt_scalef32_pk_bf16_fp4",
    ),
    "op_sel ignored": (converts, "widen_pair", "(select[0] + 2 * select[1])", "0", "bf16_fp4_16"),
    "e8m0 bias 126": (matrix, "_scale_reader", "e8m0(codes)", "e8m0(codes + U32(1))", "fp8_fp4_16"),
    "scale byte ignored": (matrix, "_scale_reader", ">> U32(shift)", ">> U32(0)", "fp8_fp4_32"),
    "scales swapped": (
        matrix,
        "_scales",
        "for i, operand in enumerate(operands)",
        "for i, operand in enumerate(operands[::-1])",
        "fp8_fp4_16",
    ),
    "mfma rows": (matrix, "_to_lanes", "(1, 3, 0, 2, 4)", "(3, 1, 0, 2, 4)", "bf16_fp4_32"),
    "fp8 runs of 32": (matrix, "_matrix", "run = 16 if", "run = 32 if", "fp8_fp4_16"),
    "permlane no-op": (lanes, "swap_lanes", "b[:, lower] = moved", "pass", "sort"),
    "DPP masks ignored": (vector, "dpp_permutation", "(rows >>", "(15 >>", "check_lanes"),
    "DPP shift by one more": (
        vector,
        "dpp_permutation",
        "else place - amount",
        "else place - amount - 1",
        "softmax",
    ),
    "transposing load": (
        access,
        "lds_read_transposed",
        "rows.transpose(0, 2, 1)",
        "rows",
        "matmul",
    ),
    "buffer bounds ignored": (
        access,
        "buffer_addresses",
        "offset, within",
        "offset, within | True",
        "softmax",
    ),
    "exec ignored": (waves, "Waves.write_v", "elif self.all_active", "elif True", "check_exec"),
    "barrier releases nothing": (memory, "Lds.barrier", "if not self._races", "if True", "softmax"),
    "carry ignored": (
        vector_ops,
        "",
        'define("v_addc_co_u32", "u32 mask = u32 u32 mask", add_carry)',
        'define("v_addc_co_u32", "u32 mask = u32 u32 mask", lambda a, b, c: add_carry(a, b))',
        "v_addc_co_u32",
    ),
    "denormals flushed": (
        vector_converts,
        "",
        'define_packed(f"v_pk_mul_{kind}"',
        "flushing = lambda a, b: np.where(np.abs(a) < np.finfo(F32).tiny, F32(0), a) * b\n"
        'define("v_mul_f32", "f32 = f32 f32", flushing)\n'
        'define_packed("v_pk_mul_f32", "f32 = f32 f32", flushing)',
        "fp4_gemv",
    ),
    "bf16 rounded to zero": (
        vector_converts,
        "",
        'define("v_cvt_pk_bf16_f32", "u32 = f32 f32", packed(f32_to_bf16))',
        'define("v_cvt_pk_bf16_f32", "u32 = f32 f32", packed(lambda x: x.view(U32) >> U32(16)))',
        "rmsnorm",
    ),
    "shift amount not masked": (
        vector_ops,
        "",
        'define("v_lshlrev_b32", "u32 = u32 u32", lambda amount, x: x << (amount & 31))',
        'define("v_lshlrev_b32", "u32 = u32 u32", lambda n, x: np.where(n < 32, x << (n & 31), U32(0)))',
        "v_lshlrev_b32",
    ),
    "signed compared as unsigned": (
        vector_ops,
        "",
        '"lt": operator.lt',
        'define("v_cmp_gt_i32 v_cmp_lt_i32", "mask = u32 u32", operator.lt)',
        "integers",
    ),
    "division not scaled back": (
        lanes,
        "scaled_fma",
        "lanes_of(waves.read_s64(VCC))",
        "np.zeros((1, 1), bool)",
        "check_division",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_emulator_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch):
    module, where, old, new, check = FAULTS[name]
    monkeypatch.setattr(
        target, "_kernel", Kernel
    )  # no cache: it would hold kernels without the fault

    def run_check() -> None:
        if check in SAMPLES:
            run_sample(check)
        elif check in CHECKS:
            CHECKS[check]()
        else:
            check_vector(check)

    run_check()
    with fault(module, where, old, new), pytest.raises((AssertionError, EmulatorError)):
        run_check()
    run_check()
