"""The network on which other tools' bit maps were recorded, and those maps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from supernet.elastic.supernet import SuperNet
from tests.golden.record_bit_maps import network

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "bit_maps.json"


def made(**options: Any) -> SuperNet:
    """A supernet of it, all of whose layers are elastic."""
    return SuperNet(network(), torch.zeros(1, 3, 8, 8), **{"first_last_bits": None} | options)


@pytest.fixture(scope="session")
def recorded() -> dict[str, Any]:
    """See tests/golden/record_bit_maps.py."""
    content: dict[str, Any] = json.loads(GOLDEN.read_text())
    return content


@pytest.fixture(scope="session")
def net() -> SuperNet:
    """Bits 2 to 8, every granularity and symmetry; not to be changed."""
    return made()


@pytest.fixture(scope="session")
def net_of() -> Callable[..., SuperNet]:
    """See `made`."""
    return made


@pytest.fixture(scope="session")
def bits_of() -> Callable[..., dict[str, tuple[int, int]]]:
    """Weight and input bits of each layer of a subnet."""
    return lambda net, config: {row.name: (row.weight_bits, row.input_bits) for row in net.layer_costs(config)}
