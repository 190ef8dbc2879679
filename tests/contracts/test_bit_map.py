"""Laws of every form of bit maps of conf/assignment."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from supernet.config import build
from supernet.elastic.supernet import SuperNet
from supernet.export.assignments.names import Names
from supernet.interfaces import BitMapReader, BitMapWriter
from tests.golden.record_bit_maps import network

FORMS = sorted((Path(__file__).parents[2] / "conf" / "assignment").glob("*.yaml"))
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "bit_maps.json").read_text())
EXAMPLES = {
    "modelopt": [case["config"] for case in GOLDEN["modelopt"]["cases"].values()]
    + [GOLDEN["modelopt"]["auto"]["best"]],
    "aimet": list(GOLDEN["aimet"]["encodings"].values()),
    "mct": [GOLDEN["mct"]["nodes"]],
    "hawq": [entry["bits"] for entry in GOLDEN["hawq"].values() if "bits" in entry],
    "plain": [{"fc": [4, 8]}, {"fc": {"weight": 4}}],
}


@pytest.fixture(params=FORMS, ids=lambda path: path.stem)
def form(request):
    return request.param.stem, build(OmegaConf.load(request.param))


@pytest.fixture(scope="module")
def net():
    made = SuperNet(network(), torch.zeros(1, 3, 8, 8), bits=(4, 8), first_last_bits=None, symmetries=[True])
    made.calibrate([torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))])
    return made.eval()


class TestForm:
    def test_it_is_read_or_written(self, form):
        name, made = form
        assert isinstance(made, BitMapReader | BitMapWriter)
        assert isinstance(made, BitMapReader) == (name in EXAMPLES), "a form that is read has examples above"

    def test_it_recognises_its_own_and_no_other(self, form):
        name, made = form
        if isinstance(made, BitMapReader):
            assert {other for other, some in EXAMPLES.items() for one in some if made.recognises(one)} == {name}
            for nothing in ({}, [], None, "w4a4", 4, [4, 8]):
                assert not made.recognises(nothing)

    def test_a_map_of_another_network_is_refused(self, form):
        name, made = form
        if isinstance(made, BitMapReader):
            other = SuperNet(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.zeros(1, 4))
            exact = GOLDEN["modelopt"]["written"][0]["config"] if name == "modelopt" else EXAMPLES[name][0]
            with pytest.raises(ValueError, match="no layer here is called"):
                made.read(exact, Names(other))

    def test_what_it_writes_is_json_and_comes_back(self, form, net):
        _, made = form
        if isinstance(made, BitMapWriter):
            for seed in range(5):
                config = net.space.sample(np.random.default_rng(seed))
                content = made.write(net, config)
                assert json.loads(json.dumps(content)) == content
                if isinstance(made, BitMapReader):
                    assert made.recognises(content)
                    said = made.read(content, Names(net))
                    assert {name: stated.bits for name, stated in said.items()} == {
                        n: c.bits for n, c in config.items()
                    }

    def test_files_beside_it_are_named_and_not_empty(self, form, net):
        _, made = form
        if isinstance(made, BitMapWriter):
            config = net.space.uniform("w4a8")
            beside = made.beside(net.materialise(config).eval(), net)
            assert all(content and "/" not in name for name, content in beside.items())
