"""The report says what the files say, says what is missing, and needs no network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search import figures, page
from search.front import Candidate, Found, Front, save_front
from search.report import write_report
from supernet.artefacts import provenance, write_json
from supernet.config import QuantConfig

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Balanced(HTMLParser):
    """Fails where a tag is not closed, and keeps text, links and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if "script" in self.open else self.words).append(data)


def parsed(path: Path) -> Balanced:
    parser = Balanced()
    parser.feed(path.read_text())
    parser.close()
    assert not parser.open
    return parser


def words(path: Path) -> str:
    return " ".join(" ".join(parsed(path).words).split())


@pytest.fixture
def run(tmp_path: Path, chain: Any) -> Path:
    """A run directory after training alone."""
    space, _ = chain
    made = {"options": {}, "audit": {"layers": 20, "macs": 40_500_000, "covered": 0.998}, "epochs": 3}
    write_json(tmp_path / "a run" / "space.json", space.plain() | made | {"provenance": provenance(7)})
    (tmp_path / "a run" / "config.yaml").write_text("task:\n  name: birds & <bees>\n")
    return tmp_path / "a run"


def found(chain: Any, label: str, measured: float, std: float) -> Found:
    space, costs = chain
    config = space.uniform(label)
    control = Candidate(config, (measured - 0.02, std), measured - 0.0125, costs.of(config))
    limit = {"bitops": costs.of(config)["bitops"]}
    return Found(
        config,
        (measured - 0.01, std),
        measured,
        costs.of(config),
        label,
        limit,
        {"bitops": 0.0},
        {"uniform": control},
        False,
    )


@pytest.fixture
def searched(run: Path, chain: Any) -> Path:
    """The same after a search with a predictor."""
    space, costs = chain
    winners = [found(chain, "w2a2", 0.8125, 0.01), found(chain, "w4a4", 0.9375, 0.01)]
    rows = space.sample_indices(5, np.random.default_rng(0))
    behind = Front(
        winners, space.fingerprint, rows, np.linspace(0.7, 0.9, 5), {"bitops": costs.kinds["bitops"].value(rows)}
    )
    save_front(run / "front.json", behind, seed=7)
    for winner in winners:
        layers = [
            {
                "name": layer.name,
                "weight_bits": bits_of(winner, layer.weight),
                "input_bits": bits_of(winner, layer.input),
            }
            for layer in costs.layers
        ]
        write_json(run / "subnets" / f"{winner.config.id}.json", {"fingerprint": space.fingerprint, "layers": layers})
    return run


def bits_of(winner: Found, name: str) -> int:
    choice = winner.config[name]
    assert isinstance(choice, QuantConfig)
    return choice.bits


def card(passed: bool, accuracy: float = 0.9111) -> dict[str, Any]:
    proof = {
        "passed": passed,
        "failures": [] if passed else ["accuracy: 80.00 % in the file, 91.00 % deployed"],
        "accuracy": {"file": accuracy, "deployed": accuracy},
        "agreement": 0.9988,
        "images": 450,
        "bytes": {"file": 12_500, "float": 50_000},
    }
    about = {"budget": "w9a9"}
    return {
        "profile": "int8",
        "about": about,
        "verification": proof,
        "measured": {"latency": {"file_ms": 0.25, "float_ms": 1.0}},
    }


def judged(points: int = 6) -> dict[str, Any]:
    tau = {"kendall": 0.512, "kendall_equal_cost": None}
    spots = [{"predicted": 0.5 + k / 20, "measured": 0.52 + k / 20, "std": 0.02, "bitops": 1e6} for k in range(points)]
    figures_ = {"kendall": 0.875, "kendall_equal_cost": 0.625, "ceiling_equal_cost": 0.75, "rmse": 0.0123}
    rest = {
        "within_1_std": 0.66,
        "within_2_std": 0.97,
        "window": 0.05,
        "cost": "bitops",
        "pairs_equal_cost": 9,
        "pairs": points,
        "learned_from": 24,
    }
    return {"points": spots, "controls": {"cost alone": tau, "mean bits": tau}} | figures_ | rest


class TestReport:
    def test_it_is_one_file_that_needs_no_network(self, searched: Path) -> None:
        path = write_report(searched, searched / "report.html")
        parser = parsed(path)
        outside = [
            v for k, v in parser.attributes if k in ("src", "href", "action", "data") and not str(v).startswith("#")
        ]
        assert not outside
        assert "@import" not in path.read_text()[:20_000] and "url(" not in page.STYLE
        assert sum("plotly.js v" in script[:2000] for script in parser.scripts) == 1, "the library is there once"

    def test_every_missing_part_is_said_with_the_command_that_makes_it(self, run: Path) -> None:
        said = words(write_report(run, run / "report.html"))
        for verb in ("search", "predict", "export", "train"):
            assert f"elastibit {verb} run=a run" in said
        assert "Plotly.newPlot" not in "".join(s for s in parsed(run / "report.html").scripts if len(s) < 100_000)

    def test_figures_of_the_search_are_those_of_the_file(self, searched: Path) -> None:
        said = words(write_report(searched, searched / "report.html"))
        record = json.loads((searched / "front.json").read_text())["subnets"][1]
        assert "w4a4 93.75% 92.75% ± 1.00% 92.50% -" in said
        assert f"{record['costs']['bytes'] / 1e3:.4g} kB" in said

    def test_what_only_ranks_is_not_shown_as_an_accuracy(self, run: Path, chain: Any) -> None:
        space, costs = chain
        rows = space.sample_indices(3, np.random.default_rng(0))
        winner = found(chain, "w4a4", 0.9, 0.0)
        front = Front(
            [winner], space.fingerprint, rows, np.array([-3.0, -4, -5]), {"bitops": costs.kinds["bitops"].value(rows)}
        )
        save_front(run / "front.json", front)
        path = write_report(run, run / "report.html")
        assert "w4a4 90.00% rank only" in words(path)
        assert "predicted, not measured" not in path.read_text()

    def test_the_predictor_stands_beside_its_controls(self, run: Path, chain: Any) -> None:
        record = {"fingerprint": chain[0].fingerprint, "report": judged() | {"provenance": provenance(7)}}
        write_json(run / "predictor.json", record)
        said = words(write_report(run, run / "report.html"))
        for part in (
            "6 of 30 subnets",
            "predictor 0.875 0.625",
            "cost alone 0.512 -",
            "0.750",
            "1.23%",
            "0.66",
            "0.97",
        ):
            assert part in said, part

    def test_exports_are_shown_with_their_verdict(self, searched: Path) -> None:
        good, bad = (s["id"] for s in json.loads((searched / "front.json").read_text())["subnets"])
        write_json(searched / "export" / good / "card.json", card(True))
        write_json(searched / "export" / bad / "failed.json", card(False, 0.8))
        write_json(searched / "export" / "0123456789" / "card.json", card(True))
        path = write_report(searched, searched / "report.html")
        said = words(path)
        assert "w2a2 int8 computes the same 91.11% of 450 99.88% 12.5 kB 25% 0.25 ms 25%" in said
        assert "w4a4 int8 differs 80.00% of 450" in said
        assert "w9a9, of an earlier search int8" in said
        assert "accuracy: 80.00 % in the file, 91.00 % deployed" in said
        assert path.read_text().count('<td class="bad">differs</td>') == 1

    def test_text_of_others_is_text(self, run: Path) -> None:
        path = write_report(run, run / "report.html", title="<script>alert(1)</script>")
        assert "birds & <bees>" in words(path)
        assert "<script>alert(1)" not in path.read_text()

    def test_it_says_where_it_comes_from(self, searched: Path, chain: Any) -> None:
        said = words(write_report(searched, searched / "report.html"))
        assert chain[0].fingerprint in said
        assert re.search(r"space\.json .* 7 ", said) and re.search(r"front\.json .* 7 ", said)

    def test_files_of_another_space_are_refused(self, searched: Path, chain: Any) -> None:
        record = json.loads((searched / "front.json").read_text())
        (searched / "front.json").write_text(json.dumps(record | {"fingerprint": "0" * 16}))
        with pytest.raises(ValueError, match=f"{'0' * 16}.*{chain[0].fingerprint}"):
            write_report(searched, searched / "report.html")
        assert not (searched / "report.html").exists()

    def test_a_folder_that_is_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"space\.json is missing"):
            write_report(tmp_path, tmp_path / "report.html")

    def test_training_is_drawn_from_the_metrics(self, run: Path) -> None:
        (run / "metrics.csv").write_text("epoch,select/w4a4,step,train/loss\n0,0.5,10,\n0,,20,1.25\n1,0.75,20,\n")
        scripts = "".join(s for s in parsed(write_report(run, run / "report.html")).scripts if len(s) < 100_000)
        assert '"plot-accuracy"' in scripts and '"plot-loss"' in scripts
        curve = figures.curves(
            [{"step": "10", "select/w4a4": "0.5"}, {"step": "20", "select/w4a4": ""}], "select/", "", 100
        )
        assert list(curve.data[0].x) == [10.0] and list(curve.data[0].y) == [50.0]


class TestFigures:
    def test_the_front_goes_up_with_cost_and_names_its_points(self, searched: Path) -> None:
        subnets = json.loads((searched / "front.json").read_text())["subnets"]
        drawn = {trace.name: trace for trace in figures.front(subnets[::-1], "bitops", "BitOps").data}
        assert list(drawn["searched"].y) == [81.25, 93.75]
        assert list(drawn["searched"].x) == sorted(s["costs"]["bitops"] for s in subnets)
        assert list(drawn["best uniform"].y) == [80.0, 92.5]
        assert "<b>w4a4</b>" in drawn["searched"].text[1] and "measured 93.75%" in drawn["searched"].text[1]

    @pytest.mark.parametrize(("low", "high"), [(1.1e5, 2.9e7), (999.0, 1001.0), (7.0, 7.0)])
    def test_the_axis_of_costs_has_marks_around_its_range(self, low: float, high: float) -> None:
        marks = figures._marks(low, high)
        assert marks == sorted(marks) and len(marks) >= 2
        assert marks[0] <= low and marks[-1] >= high
        assert all(f"{mark:.0e}"[0] in "125" for mark in marks)

    def test_a_layer_that_does_not_run_is_an_empty_field(self) -> None:
        layer = {"name": "a", "weight_bits": 3, "input_bits": 4}
        other = {"name": "b", "weight_bits": 5, "input_bits": 6}
        subnets = [{"label": "x", "layers": [layer, other]}, {"label": "y", "layers": [other]}]
        weights, inputs = figures.layer_bits(subnets, ["b", "a"]).data
        assert [list(row) for row in weights.z] == [[5, 3], [5, None]]
        assert [list(row) for row in inputs.z] == [[6, 4], [6, None]]
        assert list(weights.x) == ["b", "a"] and list(weights.y) == ["x", "y"]


class TestPage:
    def test_cells_are_escaped_and_verdicts_marked(self) -> None:
        html = page.table(("a<b",), [(page.Verdict("no & no", False),), ("<i>",)])
        assert html.count("<td") == 2 and '<td class="bad">no &amp; no</td>' in html
        assert "a&lt;b" in html and "&lt;i&gt;" in html
