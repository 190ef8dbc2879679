"""README's section on search and prediction says what the results say."""

from pathlib import Path

from benchmarks.searching.report import section
from supernet.artefacts import write_json

MACHINE = {"provenance": {"measured": {"cpu": "A Processor"}}}


def test_without_results_there_is_no_section(tmp_path: Path) -> None:
    assert section(tmp_path) is None


def test_figures_beside_their_goals(tmp_path: Path) -> None:
    rows = [
        {"algorithm": "nsga2", "seeded": True, "searches": 3, "mean": 0.0, "worst": 0.0009},
        {"algorithm": "nsga2", "seeded": False, "searches": 3, "mean": 0.01, "worst": 0.06},
        {"algorithm": "genetic", "seeded": False, "searches": 3, "mean": 0.01, "worst": 0.9},
    ]
    write_json(tmp_path / "search.json", {"additive": {"summary": rows} | MACHINE})
    verdicts = ["win", "tie", "tie", "loss"]
    judged = [{key: {"verdict": v} for key in ("at_limit", "at_cost")} for v in verdicts]
    ranked = {"search": {"ranked_by": "Additive"}}
    write_json(tmp_path / "assignments.json", {"rows": judged, "pooled": judged[:3]} | ranked | MACHINE)
    subnets = [{"budget": "w3a3", "best_measured": {"test": 0.851}, "searched": {"test": 0.848}}]
    write_json(tmp_path / "cifar10_resnet20.json", {"rows": subnets, "pairs": 7} | MACHINE)
    lines = (section(tmp_path) or "").splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:7]] == ["yes", "**no**", "**no**", "**no**", "**no**"]
    assert "0.090 % (mean 0.000 %)" in lines[2] and "6.000 %" in lines[3]
    assert "1 won, 2 tied, 1 lost (seeds pooled: 1, 2, 0)" in lines[4]
    assert "ranked by the sensitivity" in lines[4]
    assert "w3a3 +0.30" in lines[6] and lines[-1].startswith("A Processor")
