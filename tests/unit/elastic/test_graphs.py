"""How many graphs a compiled supernet takes, and which passes run eagerly."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from supernet.backbones.cifar_resnet import CifarResNet
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
    with counted() as made:
        yield made


def evaluated(net: SuperNet, config: SubnetConfig, x: Tensor = X) -> Tensor:
    with torch.no_grad(), net.as_subnet(config):
        return net(x)


def strictly() -> object:
    """Inside, another graph is an error, and so is falling back to eager execution."""
    return torch._dynamo.config.patch(error_on_recompile=True, fail_on_recompile_limit_hit=True)


class TestRegional:
    def run(self, net: SuperNet, graphs: Graphs, x: Tensor, made: int, rng: np.random.Generator) -> None:
        """A thousand random subnets after three fixed ones; `made`: the graphs that these take."""
        net.compile("regional")
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

    def test_a_thousand_subnets_at_random_depth_take_the_graphs_of_the_first_three(
        self, graphs: Graphs, rng: np.random.Generator
    ) -> None:
        """Stem, block and head."""
        self.run(small(blocks=2), graphs, X, 3, rng)

    @pytest.mark.slow
    @pytest.mark.parametrize("depth", [14, 20])
    def test_and_so_it_is_for_a_residual_network(self, graphs: Graphs, rng: np.random.Generator, depth: int) -> None:
        """Stem, head, the blocks of the first stage, and in the others the first block and what the rest share."""
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        blocks = (depth - 2) // 6
        net = SuperNet(CifarResNet(depth, 5, channels=(4, 6, 8), min_depth=blocks - 1), x[:1], bits=(2, 4, 8))
        net.calibrate([x])
        self.run(net, graphs, x, 2 + 1 + 2 + 2, rng)


class TestWhole:
    def test_one_graph_serves_every_choice(self, graphs: Graphs, rng: np.random.Generator) -> None:
        net = small()
        net.compile("whole")
        step(net, net.space.largest())
        assert graphs.networks == 1
        with strictly():
            for _ in range(100):
                step(net, net.space.sample(rng))
        assert graphs.networks == 1 and graphs.functions == 0

    def test_it_needs_a_space_without_architecture(self, net: SuperNet) -> None:
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
        net = small()
        net.compile("regional", "evaluation")
        step(net, net.space.largest())
        assert graphs.networks == 0 and 6 <= graphs.functions <= FUNCTIONS
        evaluated(net.train(), net.space.largest(), FEWER)
        evaluated(net.eval(), net.space.largest(), X)
        assert graphs.networks == 6
        with strictly():
            for config in (net.space.smallest(), net.space.uniform("w2a4")):
                evaluated(net.train(), config, FEWER)
                evaluated(net.eval(), config, X)
                step(net, config)
        assert graphs.networks == 6 and 6 <= graphs.functions <= FUNCTIONS
