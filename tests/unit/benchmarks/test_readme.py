"""benchmarks/readme.py: README's performance section is what the committed results give."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from supernet.artefacts import write_json

GOAL = {
    "work": "one-subnet step",
    "model": "resnet20",
    "contestant": "ours.whole",
    "measure": "step",
    "limit": 1.1,
    "against": ["fp32.compiled*"],
    "denominator": "fp32.compiled",
    "value": 1.104,
    "low": 1.09,
    "high": 1.12,
    "met": False,
}
GRAPHS = GOAL | {
    "work": "new graphs",
    "measure": "new_graphs",
    "value": 0,
    "low": 0,
    "high": 0,
    "met": True,
    "against": [],
    "denominator": None,
}
MISSING = GOAL | {
    "work": "evaluating",
    "measure": "evaluate",
    "value": None,
    "low": None,
    "high": None,
    "met": None,
    "denominator": None,
}


def results() -> dict[str, Any]:
    def one(name: str, goal: dict[str, Any]) -> dict[str, Any]:
        measured = {"measured": {"cpu": "A Processor"}}
        facts = {"command": f"{name}.py", "torch": "2.14.1", "threads": 2, "rounds": 40, "judged": "judged"}
        return facts | {"goals": [goal], "provenance": measured}

    return {n: one(n, g) for n, g in (("step_time", GOAL), ("compile", GRAPHS), ("evaluate", MISSING))}


class TestSection:
    def test_ratios_without_sites_are_told_where_they_were_measured(self) -> None:
        found, fp32 = results(), {"value": 1.05, "low": 1.04, "high": 1.063}
        bare = readme.section(found)
        contestants = {
            "ours.whole": {"step": {"ratios": {"fp32": fp32 | {"value": 1.2}}}},
            "ours.whole.no_sites": {"step": {"ratios": {"fp32": fp32}}},
            "ours.off.no_sites": {"memory": {}},
        }
        found["step_time"]["models"] = {"resnet18": {"contestants": contestants}, "python": {}}
        line = (
            "A one-subnet step without deployment sites, against the fastest fp32: "
            "ResNet-18, 64 px, whole: 1.050 [1.040, 1.063]."
        )
        assert set(readme.section(found).splitlines()) - set(bare.splitlines()) == {line}

    def test_says_every_goal_with_its_figure(self) -> None:
        lines = readme.section(results()).splitlines()
        want = "| one-subnet step | ResNet-20, 32 px | whole | fp32.compiled | 1.104 [1.090, 1.120] | 1.1 | **no** |"
        assert want in lines
        assert "| new graphs | ResNet-20, 32 px | whole | - | 0 | 1.1 | yes |" in lines
        assert "| evaluating | ResNet-20, 32 px | whole | fp32.compiled* | - | 1.1 | not measured |" in lines
        text = "\n".join(lines)
        assert "A Processor, 2 threads, torch 2.14.1" in text and "`python benchmarks/compile.py`" in text

    def test_what_two_scripts_measure_is_said_once(self) -> None:
        found = results()
        found["compile"]["goals"].append(GOAL | {"value": 1.0, "low": 1.0, "high": 1.0, "met": True})
        lines = [line for line in readme.section(found).splitlines() if line.startswith("| one-subnet step |")]
        assert len(lines) == 1 and lines[0].endswith("| 1 | 1.1 | yes |")

    def test_says_why_goals_are_not_judged(self) -> None:
        found = results()
        found["compile"]["judged"] = "not judged: 5 configurations"
        assert "benchmarks/compile.py: not judged: 5 configurations." in readme.section(found)

    def test_results_of_two_machines_make_no_section(self) -> None:
        found = copy.deepcopy(results())
        found["evaluate"]["provenance"]["measured"]["cpu"] = "Another"
        with pytest.raises(ValueError, match=r"evaluate: Another with torch 2\.14\.1"):
            readme.section(found)

    def test_the_gpu_has_a_table_of_its_own(self) -> None:
        variant = {"images_per_second": 3210.4, "share_of_product": 0.412}
        found = results() | {
            "gpu": {
                "command": "gpu.py",
                "torch": "2.14.1",
                "device": "Some GPU",
                "judged": "judged",
                "setting": {"model": "resnet18", "size": 224, "batch": 256},
                "goals": [GOAL],
                "variants": {"ours.whole": variant},
                "skipped": ["profile of ours.whole"],
                "failed": {},
            }
        }
        text = readme.section(found)
        assert "| one-subnet step | resnet18, 224 px, batch 256 | whole |" in text and "Some GPU, torch 2.14.1." in text
        assert "- ours.whole: 3210 images/s, 41 % of the product ceiling" in text
        assert "- skipped: profile of ours.whole" in text


EXPORT = {
    "command": "export.py",
    "onnxruntime": "1.32.0",
    "threads": 1,
    "rounds": 40,
    "judged": "judged",
    "goals": [GOAL | {"work": "time of an image", "model": "mobilenetv2", "contestant": "ours.int8"}],
    "provenance": {"measured": {"cpu": "A Processor"}},
    "models": {
        "mobilenetv2": {
            "about": {"trained": True, "test": 64},
            "accuracy": {"float": 0.875},
            "failed": {"ort.static": "ValueError: no"},
            "sizes": {"4": {"bare": 2_659_000, "over_ideal": 1.0266, "over_nominal": 1.031}},
            "contestants": {
                "ours.int8": {
                    "bytes": 3_780_000,
                    "error": 0.063,
                    "seconds": 9.21,
                    "latency": {"low": 0.003, "value": 0.004, "high": 0.005, "rounds": [0.004] * 40}
                    | {"ratios": {"fp32": {"against": "fp32.twin", "low": 0.4, "value": 0.5, "high": 0.6}}},
                }
            },
        }
    },
}


class TestExport:
    def test_says_files_sizes_accuracy_failures_and_goals(self) -> None:
        text = readme.export_section(EXPORT)
        cells = "4.000 [3.000, 5.000] | 0.500 [0.400, 0.600] | - | 0.063 | 3.78 | 9.2 |"
        assert f"| mobilenetv2 | ours.int8 | {cells}" in text
        assert "| mobilenetv2 | 2659 (1.027, 1.031) |" in text and "on 64 test images: float 87.5 %" in text
        assert "Failed and left out: mobilenetv2, ort.static: ValueError: no" in text
        assert "| time of an image | MobileNetV2, 224 px | int8 | fp32.compiled | 1.104 [1.090, 1.120] |" in text
        assert "A Processor, 1 thread, batch 1, onnxruntime 1.32.0." in text

    def test_it_has_marks_of_its_own(self, tmp_path: Path) -> None:
        assert readme.exported(tmp_path) is None
        write_json(tmp_path / "export.json", EXPORT)
        found = readme.sections(results(), readme.exported(tmp_path))
        assert list(found) == [readme.MARKS, readme.EXPORT_MARKS]
        assert list(readme.sections(results(), None)) == [readme.MARKS]
        text = "\n".join([*readme.MARKS, *readme.EXPORT_MARKS])
        new = readme.replaced(text, "block", readme.EXPORT_MARKS)
        assert new.startswith("\n".join(readme.MARKS)) and "\nblock\n" in new


class TestFile:
    def test_only_what_lies_between_the_marks_is_replaced(self) -> None:
        text = f"before\n{readme.MARKS[0]}\nold \\1\n{readme.MARKS[1]}\nafter\n"
        new = readme.replaced(text, "| \\1 |")
        assert new == f"before\n{readme.MARKS[0]}\n| \\1 |\n{readme.MARKS[1]}\nafter\n"
        assert readme.replaced(new, "| \\1 |") == new

    @pytest.mark.parametrize("text", ["no marks", f"{readme.MARKS[1]}\n{readme.MARKS[0]}", f"{readme.MARKS[0]} only"])
    def test_a_file_without_its_marks_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"README\.md needs"):
            readme.replaced(text, "block")

    def test_missing_results_say_what_to_run(self, tmp_path: Path) -> None:
        write_json(tmp_path / "compile.json", {})
        with pytest.raises(FileNotFoundError, match=r"of step_time, evaluate; run python benchmarks/step_time\.py and"):
            readme.results(tmp_path)

    def test_writes_once_and_finds_itself_up_to_date(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name, of in results().items():
            write_json(tmp_path / f"{name}.json", of)
        file = tmp_path / "README.md"
        file.write_text(f"{readme.MARKS[0]}\n{readme.MARKS[1]}\n")
        found = readme.results(tmp_path)
        monkeypatch.setattr(readme, "README", file)
        monkeypatch.setattr(readme, "results", lambda: found)
        monkeypatch.setattr(readme, "exported", lambda: None)
        monkeypatch.setattr(readme.searching, "section", lambda folder: None)
        assert [readme.main(["--check"]), readme.main([]), readme.main(["--check"])] == [1, 0, 0]
        assert readme.section(found) in file.read_text()


def test_the_readme_says_what_the_committed_results_give() -> None:
    missing = [name for name in readme.NEEDED if not (readme.RESULTS / f"{name}.json").exists()]
    if missing:
        pytest.skip(f"benchmarks/results does not hold {', '.join(missing)} yet: the benchmarks were not run")
    text = readme.README.read_text()
    searched = readme.searching.section(readme.RESULTS)
    for marks, block in readme.sections(readme.results(), readme.exported(), searched).items():
        assert readme.replaced(text, block, marks) == text, "run python benchmarks/readme.py"
