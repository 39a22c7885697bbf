"""A HIP launch that is compiled for a card which is not here, and run in the emulator."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fast import hip_compiler
from fast.hip import HipLaunch
from fast.hip_compiler import Kernel
from qwen35.errors import InputError
from tools import cards
from tools.gfx950.assembly import EmulatorError
from tools.gfx950.target import compile_launch, emulate

# Each workgroup adds its number to 64 integers. The first one waits for the last one's flag.
SOURCE = """
extern "C" __attribute__((global)) void add(int* x, int* flag, int last, float unused) {
  int workgroup = __builtin_amdgcn_workgroup_id_x();
  x[64 * workgroup + __builtin_amdgcn_workitem_id_x()] += workgroup + 1;
  if (workgroup == last)
    __hip_atomic_store(flag, 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  if (flag && workgroup == 0)
    while (!__hip_atomic_load(flag, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT))
      __builtin_amdgcn_s_sleep(1);
}
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HipLaunch:
    """Three workgroups; the flag is a null pointer, and nobody waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "add.hip"
    source.write_text(SOURCE)
    arguments = {"x": torch.zeros(192, dtype=torch.int32), "flag": None, "last": -1, "unused": 0.5}
    return HipLaunch("addition", Kernel(source, "add", ()), (3, 1, 1), arguments, {"num_warps": 1})


def waiting(launch: HipLaunch, **more: bool) -> HipLaunch:
    flag = torch.zeros(1, dtype=torch.int32)
    return replace(launch, arguments=launch.arguments | {"flag": flag, "last": 2}, **more)


def test_what_is_compiled(launch: HipLaunch) -> None:
    found = compile_launch(launch, "gfx950")
    assert (found.name, found.target, found.shared, found.num_warps) == ("add", "gfx950", 0, 1)
    assert found.parameters == (("x", "*"), ("flag", "*"), ("last", "i32"), ("unused", "fp32"))
    assert found.text == hip_compiler.assembly(launch.kernel)
    assert found.binary == hip_compiler.code_object(launch.kernel)
    with pytest.raises(InputError, match="addition: a HIP kernel for gfx950; this is sm_90"):
        compile_launch(launch, "sm_90")


def test_some_workgroups_and_a_trace(launch: HipLaunch) -> None:
    """The trace sees each instruction of each wave."""
    seen: list[int] = []
    done = emulate([launch], only=[(1, 0, 0)], trace=lambda place, waves: seen.append(len(waves)))
    assert launch.arguments["x"].tolist() == [0] * 64 + [2] * 64 + [0] * 64
    assert sum(seen) == done.instructions > 5


def test_workgroups_that_wait_for_each_other_run_together(launch: HipLaunch) -> None:
    """Whatever the batch is. Others run in batches, as many at a time as are asked for."""
    emulate([waiting(launch, together=True)], batch=1)
    emulate([waiting(launch)], batch=3)
    with pytest.raises(EmulatorError, match=r"^addition: .*"):
        emulate([waiting(launch)], batch=2, limit=20_000)
    assert launch.arguments["x"][::64].tolist() == [3, 6, 6]
    many = 16 * cards.UNITS * 2 + 1  # more than may be there at once
    with pytest.raises(InputError, match=rf"addition: {many} workgroups wait for each other"):
        emulate([replace(waiting(launch, together=True), grid=(many, 1, 1))])


def test_a_kernel_sees_a_tensor_from_its_first_to_its_last_element(launch: HipLaunch) -> None:
    """Within a storage, and with steps; what lies behind is out of bounds."""
    storage = torch.zeros(200, dtype=torch.int32)
    emulate([replace(launch, arguments=launch.arguments | {"x": storage[5:197]})])
    assert storage.tolist() == [0] * 5 + [1] * 64 + [2] * 64 + [3] * 64 + [0] * 3
    steps = torch.zeros(96, 3, dtype=torch.int32)[
        :, :2
    ].t()  # 287 elements from the first to the last
    emulate([replace(launch, arguments=launch.arguments | {"x": steps})])
    assert steps[0, 21:23].tolist() == [1, 2]
    for short in (storage[5:196], torch.zeros(0, dtype=torch.int32)):
        with pytest.raises(EmulatorError, match="outside of every array"):
            emulate([replace(launch, arguments=launch.arguments | {"x": short})])
