"""How many graphs a compiled supernet takes, and which passes run eagerly."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from supernet.backbones.cifar_resnet import CifarResNet
from supernet.calibration.batchnorm import recalibrated
from supernet.config import SubnetConfig
from supernet.elastic.supernet import MODES, SuperNet
from tests.unit.elastic.conftest import X, small, step
from tests.unit.quant.graphs import HIDDEN, Graphs, counted

pytestmark = HIDDEN
FEWER, MORE = X[:3], torch.cat([X, X])
# Forward and backward of activations, of those that may pass through, and of weights; and once more where scales lie at
# the very start of the bank, which torch takes for a case of its own.
FUNCTIONS = 8


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    with counted("eager") as made:
        yield made


def evaluated(net: SuperNet, config: SubnetConfig, x: Tensor = X) -> Tensor:
    with torch.no_grad(), net.as_subnet(config):
        return net(x)


def strictly() -> object:
    """Inside, another graph is an error, and so is falling back to eager execution."""
    return torch._dynamo.config.patch(error_on_recompile=True, fail_on_recompile_limit_hit=True)


class TestRandom:
    """A thousand random subnets after three fixed ones need no further graph."""

    def run(self, net: SuperNet, mode: str, graphs: Graphs, made: int, rng: np.random.Generator, x: Tensor = X) -> None:
        """`made`: the graphs that the fixed ones take."""
        net.compile(mode)
        for config in (net.space.smallest(), net.space.uniform("w2a4"), net.space.largest()):
            step(net, config, x)
        assert graphs.networks == made
        depths = set[tuple[object, ...]]()
        with strictly():
            for k in range(1000):
                config = net.space.sample(rng)
                depths.add(tuple(v for n, v in config.items() if n.endswith(".depth")))
                if k % 10:
                    with net.as_subnet(config):
                        net(x)
                else:  # backward graphs belong to forward ones, so that some backward passes do
                    step(net, config, x)
        assert len(depths) == 2 ** len(net.elastic_depths)
        assert graphs.networks == made and graphs.functions == 0

    def test_regional_at_random_depth(self, graphs: Graphs, rng: np.random.Generator) -> None:
        """Stem, block and head."""
        self.run(small(blocks=2), "regional", graphs, 3, rng)

    def test_whole(self, graphs: Graphs, rng: np.random.Generator) -> None:
        self.run(small(), "whole", graphs, 1, rng)

    @pytest.mark.slow
    @pytest.mark.parametrize("depth", [14, 20])
    def test_regional_residual_network(self, graphs: Graphs, rng: np.random.Generator, depth: int) -> None:
        """Stem, head, the blocks of the first stage, and in the others the first block and what the rest share."""
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        blocks = (depth - 2) // 6
        net = SuperNet(CifarResNet(depth, 5, channels=(4, 6, 8), min_depth=blocks - 1), x[:1], bits=(2, 4, 8))
        net.calibrate([x])
        self.run(net, "regional", graphs, 2 + 1 + 2 + 2, rng, x)

    def test_whole_needs_a_space_without_architecture(self, net: SuperNet) -> None:
        with pytest.raises(
            ValueError, match=r"compile=whole needs a space .* has layer1.depth, .*; use compile=regional"
        ):
            net.compile("whole")
        assert net.compiled == "off"


class TestQuantizers:
    def test_activations_inputs_that_may_pass_and_weights_have_a_graph_each_way(
        self, graphs: Graphs, rng: np.random.Generator
    ) -> None:
        net = small(blocks=2)
        net.compile("quantizers")
        step(net, net.space.largest())
        assert 6 <= graphs.functions <= FUNCTIONS and graphs.networks == 0
        with strictly():
            for x in (X, FEWER, MORE):
                step(net, net.space.sample(rng), x)
                evaluated(net, net.space.sample(rng), x)


class TestWhen:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "full"}, "compile is off, quantizers, regional or whole, got 'full'"),
            ({"mode": "regional", "passes": "both"}, "passes is training or evaluation, got 'both'"),
        ],
    )
    def test_other_words_are_refused(self, net: SuperNet, options: dict[str, str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            net.compile(**options)
        assert net.compiled == "off" and not any(q.fuse for q in net.quantizers.values())

    def test_off_is_as_before(self, graphs: Graphs) -> None:
        net = small()
        before = step(net, net.space.smallest())
        net.compile("regional")
        net.compile("off")
        assert torch.equal(step(net, net.space.smallest()), before)
        assert graphs.networks == graphs.functions == 0 and net.compiled == "off"

    @pytest.mark.parametrize("mode", MODES[2:])
    def test_other_batches_and_evaluation_run_eagerly_beside_compiled_training(self, graphs: Graphs, mode: str) -> None:
        """By the quantizers' functions, whose graphs serve every size."""
        net = small()
        eager, config = copy.deepcopy(net), net.space.uniform("w4a4")
        net.compile(mode)
        evaluated(net, net.space.largest())
        assert graphs.networks == 0
        step(net, net.space.largest())
        made = 3 if mode == "regional" else 1
        assert graphs.networks == made
        step(net, net.space.largest(), FEWER)
        assert 6 <= graphs.functions <= FUNCTIONS
        with strictly():
            for x in (FEWER, MORE, X):
                step(net, net.space.smallest(), x)
                evaluated(net, net.space.largest(), x)
            torch.testing.assert_close(step(net, config, MORE), step(eager, config, MORE), rtol=1e-4, atol=1e-4)
        assert graphs.networks == made

    def test_training_runs_eagerly_beside_compiled_evaluation(self, graphs: Graphs) -> None:
        """Recalibration has graphs of its own: BatchNorm that counts is other code, and batches may be larger."""
        net = small().eval()

        def measure(config: SubnetConfig) -> None:
            with torch.no_grad(), net.as_subnet(config), recalibrated(net, [FEWER, FEWER]):
                net(X)

        net.compile("regional", "evaluation")
        step(net, net.space.largest())
        assert graphs.networks == 0 and 6 <= graphs.functions <= FUNCTIONS
        measure(net.space.largest())
        assert graphs.networks == 6
        with strictly():
            for config in (net.space.smallest(), net.space.uniform("w2a4")):
                measure(config)
                step(net, config)
        assert graphs.networks == 6 and 6 <= graphs.functions <= FUNCTIONS
