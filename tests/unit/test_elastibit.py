"""The Python names and the console command: there, light, and clear about what is not there."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import elastibit


class TestPythonNames:
    @pytest.mark.parametrize("name", sorted(elastibit._NAMES))
    def test_every_lazy_name_is_there(self, name: str) -> None:
        module, attribute = elastibit._NAMES[name].split(":")
        assert getattr(elastibit, name) is getattr(importlib.import_module(module), attribute)
        assert name in dir(elastibit)

    @pytest.mark.parametrize("verb", sorted(elastibit._DOORS))
    def test_every_door_is_there(self, verb: str) -> None:
        assert callable(importlib.import_module(elastibit._DOORS[verb]).main)
        assert (Path(elastibit.__file__).parent / "conf" / f"{verb}.yaml").is_file()

    def test_search_is_the_function_also_when_the_package_is_loaded(self) -> None:
        importlib.import_module("search")
        assert callable(elastibit.search)

    def test_a_name_that_is_none(self) -> None:
        with pytest.raises(AttributeError, match=r"no name 'Supernet' \(did you mean SuperNet\?\)"):
            elastibit.Supernet  # noqa: B018

    def test_a_file_that_hides_a_package_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "search.py").write_text("")
        (tmp_path / "mine.py").write_text("import elastibit as eb\neb.SuperNet\neb.search\n")
        done = subprocess.run([sys.executable, str(tmp_path / "mine.py")], capture_output=True, text=True, check=False)
        last = done.stderr.splitlines()[-1]
        assert last == (
            f"ImportError: {tmp_path / 'search.py'} hides elastibit's package 'search'; "
            "rename it, or start from another folder"
        )

    def test_a_benchmark_of_that_name_finds_the_package(self, tmp_path: Path) -> None:
        root, out = Path(elastibit.__file__).parent, tmp_path / "search.json"
        words = ["benchmarks/search.py", "--only", "speed", "--json", str(out)]
        subprocess.run([sys.executable, *words], check=True, cwd=root, capture_output=True)
        assert out.is_file()

    def test_import_is_light(self) -> None:
        script = """
            import sys, time
            start = time.process_time()
            import elastibit
            spent = time.process_time() - start
            heavy = {"torch", "timm", "pytorch_lightning", "wandb", "hydra", "numpy"} & set(sys.modules)
            assert not heavy, heavy
            assert spent < 0.5, spent
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


class TestCommand:
    def test_of_everything(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert elastibit.main(["--help"]) == elastibit.main([]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert all(re.search(rf"^ +{verb}\b", out, re.MULTILINE) for verb in elastibit._DOORS)

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert elastibit.main(["--version"]) == 0
        assert capsys.readouterr().out == f"elastibit {elastibit.__version__}\n"

    def test_a_verb_that_is_none(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert elastibit.main(["serach", "run=a"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("elastibit: no verb 'serach' (did you mean search?); choose one of train, ")
