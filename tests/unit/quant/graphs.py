"""Compilation without inductor, which takes seconds for each graph, and with every graph counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from supernet.quant.ste import fused

# Torch keeps this warning about what it does itself from users by a hook that a filter of errors does not reach.
HIDDEN = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


COMPILE = torch.compile  # as it is before any test replaces it: countings may be nested


class Graphs:
    """Graphs made by `torch.compile`: those of the quantizers' functions and those of networks and regions."""

    def __init__(self, backend: str) -> None:
        self._functions, self._networks = (CompileCounterWithBackend(backend) for _ in range(2))

    @property
    def functions(self) -> int:
        """Graphs of the quantizers' functions, which are compiled for any number of elements."""
        return int(self._functions.frame_count)

    @property
    def networks(self) -> int:
        """Graphs of networks and regions, which are compiled for one set of shapes."""
        return int(self._networks.frame_count)

    def compile(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Stands in for `torch.compile`."""

        def compile(function: Any, *, dynamic: bool, fullgraph: bool = False, options: Any = None) -> Any:
            backend = self._functions if dynamic else self._networks
            return real(function, backend=backend, dynamic=dynamic, fullgraph=fullgraph)

        return compile


@contextmanager
def counted(backend: str = "aot_eager") -> Iterator[Graphs]:
    """Inside, everything is compiled anew and counted, whatever was compiled before.

    Args:
        backend: `aot_eager` runs what inductor would be given; `eager` runs what was traced, which is enough to count.
    """
    graphs = Graphs(backend)
    before = torch.compile
    torch._dynamo.reset()
    fused.cache_clear()
    torch.compile = graphs.compile(COMPILE)
    try:
        yield graphs
    finally:
        torch.compile = before
        fused.cache_clear()
        torch._dynamo.reset()
