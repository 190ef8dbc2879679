"""A chain of blocks that may be cut short: the architecture dimension that every room has to handle."""

from __future__ import annotations

from torch import Tensor, nn

from supernet.space import Dimension


class Stage(nn.Sequential):
    """Blocks of which only the first `depth` run.

    Every block after the first must keep the shape of its input and be residual, so that leaving it out is a smaller
    network of the same family (stochastic depth, Huang et al., ECCV 2016; OFA, Cai et al., ICLR 2020). Blocks are left
    out from the end.

    Args:
        blocks: the blocks in order.
        min_depth: the fewest blocks that may run, 1..len(blocks); default all (not elastic).
    """

    def __init__(self, *blocks: nn.Module, min_depth: int | None = None) -> None:
        super().__init__(*blocks)
        low = len(self) if min_depth is None else min_depth
        if not 1 <= low <= max(len(self), 1):
            raise ValueError(f"min_depth must lie in 1..{len(self)} (the number of blocks), got {low}")
        self.min_depth = low
        self.depth = len(self)

    def forward(self, x: Tensor) -> Tensor:
        """Run the first `depth` blocks; a Python skip, so that compiled blocks are reused for every depth."""
        for block in list(self)[: self.depth]:
            x = block(x)
        return x

    def dimensions(self, prefix: str) -> list[Dimension]:
        """`<prefix>.depth`, if there is anything to choose."""
        depths = tuple(range(self.min_depth, len(self) + 1))
        return [Dimension(f"{prefix}.depth", depths)] if len(depths) > 1 else []
