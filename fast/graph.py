"""Work that is captured as a CUDA or HIP graph, and replayed."""

import gc
from collections.abc import Sequence

import torch

from fast.launch import Work, run


class Pass:
    """Work on fixed buffers. On a GPU it is a graph from its second run on; the first compiles it."""

    def __init__(self, work: list[Work], device: torch.device) -> None:
        self.work, self.device = work, device
        self.has_run = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def prepare(self) -> None:
        """Compile every launch by running it, and capture all."""
        run(self.work, self.device)
        self.graph = captured(self.work)

    def run(self) -> None:
        if self.has_run and self.graph is None and self.device.type == "cuda":
            self.graph = captured(self.work)
        if self.graph is not None:
            self.graph.replay()
        else:
            run(self.work, self.device)
            self.has_run = True


def captured(work: Sequence[Work]) -> torch.cuda.CUDAGraph:
    """A captured graph of some work. The work has to have run once, so that everything is compiled.

    The garbage collector is off meanwhile: if it freed an older graph, the capture would fail.
    """
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph):
            for one in work:
                one()
    finally:
        if collects:
            gc.enable()
    return graph
