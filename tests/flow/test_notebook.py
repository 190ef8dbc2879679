"""The notebook runs from top to bottom, and is stored without what it printed."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_it_is_stored_without_output(self, path: Path) -> None:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                assert not cell.outputs and cell.execution_count is None

    def test_its_links_lead_somewhere(self, path: Path) -> None:
        texts = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
        links = re.findall(r"\]\(([^)#:]+)\)", "\n".join(texts))
        assert links and all((path.parent / link).exists() for link in links)

    def test_it_runs(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from nbclient import NotebookClient

        root = path.parents[1]
        monkeypatch.setenv("PYTHONPATH", str(root))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        notebook = nbformat.read(path, 4)
        client = NotebookClient(
            notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute()
        printed = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
        right = re.search(r"(\d+) of 450 test digits right", printed)
        assert right and int(right[1]) > 360, printed[-500:]
        assert (tmp_path / "runs" / "first_hour" / "export" / "model.onnx").is_file()
