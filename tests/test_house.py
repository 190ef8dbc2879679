"""The house keeps its rules: imports go down, every YAML names something that exists, files stay small and clean.

Where one of these fails, the joint is wrong, not the rule: move the joint first.
"""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from elastibit import _DOORS
from supernet.guide import groups

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
PACKAGES = ("supernet", "predictors", "search", "conf")

# From the bottom to the top. A module may import what stands on a lower line, nothing else; so files that share a line
# (or a folder, where the folder is named) do not know each other. The longest name that fits a module counts;
# `supernet` itself means only its `__init__.py`.
ORDER = """
supernet conf supernet.artefacts supernet.memory
supernet.config
supernet.space
supernet.formats supernet.quant.ste supernet.factors
supernet.costs
supernet.cost
supernet.interfaces
supernet.quant.ranges
supernet.quant.quantizer
supernet.quant.bank
supernet.elastic.stage supernet.elastic.first supernet.elastic.patches supernet.elastic.rectify
supernet.elastic.layers supernet.elastic.attention supernet.elastic.norm
supernet.elastic.streams
supernet.elastic.wrap
supernet.elastic.flow
supernet.elastic.regions supernet.elastic.audit supernet.elastic.sampling
supernet.elastic.supernet
supernet.elastic.compiling
supernet.samplers.controller
supernet.backbones supernet.tasks supernet.samplers supernet.calibration
supernet.training.losses supernet.training.optimizers supernet.training.loggers
supernet.run
supernet.training.module
supernet.training.fit
supernet.training.finetune
supernet.export.graph supernet.export.runtime supernet.export.suite supernet.export.dyadic
supernet.export.operators
supernet.export.operators_tokens
supernet.export.lower_tokens supernet.export.onnx_tokens supernet.export.prepare
supernet.export.fold supernet.export.lower supernet.export.kernels supernet.export.integer_operators
supernet.export.deploy
supernet.export.onnx supernet.export.integer
supernet.export.integer_onnx
supernet.export.assignments.names
supernet.export.assignments.tensors
supernet.export.assignments
supernet.export.bit_maps
supernet.export.subnets
supernet.export.verify supernet.export.lint
supernet.export.profile
supernet.export.torch supernet.export.spec supernet.export.integer_profile supernet.export.openvino
supernet.export.bundle supernet.export.pieces supernet.export.table supernet.export.targets
supernet.export.latency
supernet.export.legality
supernet.export.tables
predictors.measuring predictors.encoding predictors.judging
predictors.crew
predictors.pairs predictors.noise predictors.members predictors.effects
predictors.sensitivity
predictors.layer_outputs predictors.layer_inputs
predictors.single_changes
predictors
predictors.kept
search.words search.variation search.allocation
search.keeping search.refine
search.climb
search.problem
search
search.controls search.timing search.evolving
search.verdict search.sections
search.candidates search.judging
search.run
supernet.guide
supernet.desk
search.report search.finetune
supernet.__main__ predictors.__main__ search.__main__ supernet.export.__main__ supernet.export.probe
search.demo
elastibit
"""
RANK = {name: rank for rank, line in enumerate(ORDER.split("\n")) for name in line.split()}


def sources() -> list[Path]:
    """The Python files of the house itself."""
    return [ROOT / "elastibit.py", *(path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")))]


def all_python() -> list[Path]:
    return sources() + [path for name in ("tests", "benchmarks") for path in sorted((ROOT / name).rglob("*.py"))]


def texts() -> Iterator[Path]:
    """Every text file that is kept in the repository."""
    kinds = {".py", ".yaml", ".yml", ".toml", ".txt", ".md", ".cff", ".json", ".ipynb", ".html", ".cfg", ""}
    folders = (*PACKAGES, "tests", "benchmarks", "docs", "notebooks", ".ci")
    inside = (path for name in folders for path in sorted((ROOT / name).rglob("*")))
    for path in [*sorted(ROOT.iterdir()), *inside]:
        if path.is_file() and path.suffix in kinds and "__pycache__" not in path.parts:
            yield path


def name_of(path: Path) -> str:
    """`supernet/quant/ste.py` -> `supernet.quant.ste`; a package's `__init__.py` bears the package's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


MODULES = {name_of(path): path for path in sources()}


def imports(path: Path, with_types: bool) -> set[str]:
    """Our own modules that a file imports, anywhere in it; those only for type checkers on request."""
    skipped: set[int] = set()
    if not with_types:
        guarded = [node for node in ast.walk(tree(path)) if isinstance(node, ast.If)]
        guarded = [node for node in guarded if "TYPE_CHECKING" in ast.unparse(node.test)]
        skipped = {id(inner) for node in guarded for part in node.body for inner in ast.walk(part)}
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
                base = ".".join([*package.split(".")[: 1 - node.level or None], *filter(None, [node.module])])
            found |= {inner if (inner := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return found & MODULES.keys()


def rank(module: str) -> int:
    name = module
    while name not in RANK or (name == "supernet" != module):
        if "." not in name:
            pytest.fail(f"{module} has no place in the order; add it to ORDER in tests/test_house.py")
        name = name.rpartition(".")[0]
    return RANK[name]


class TestImports:
    @pytest.mark.parametrize("path", sources(), ids=short)
    def test_go_down_only(self, path: Path) -> None:
        module = name_of(path)
        room = module.rpartition(".")[0]
        needed = imports(path, with_types=False)
        # A type's name from the same room is no knowledge of another room, and loads nothing.
        needed |= {other for other in imports(path, with_types=True) if other.rpartition(".")[0] != room}
        upward = sorted(other for other in needed if rank(other) >= rank(module))
        assert not upward, (
            f"{module} imports {', '.join(upward)}, which does not stand below it in ORDER; move the joint"
        )

    def test_are_not_circular(self) -> None:
        graph = {module: imports(path, with_types=False) for module, path in MODULES.items()}
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            pytest.fail(f"circular imports: {' <- '.join(error.args[1])}")

    def test_order_names_only_what_it_means(self) -> None:
        assert len(RANK) == len(ORDER.split()), "a name stands twice in ORDER"

    def test_this_test_sees_imports(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The reader itself, on every way to write an import."""
        path = ROOT / "supernet" / "quant" / "imaginary.py"
        text = """
            import supernet.space
            from supernet import cost
            from . import ste
            from .ranges import x
            from ..formats import integer as i
            from typing import TYPE_CHECKING
            if TYPE_CHECKING:
                from supernet.config import y
            def f():
                from search import run
        """.replace("\n            ", "\n")
        known = (
            "supernet.space supernet.cost supernet.quant.ste supernet.quant.ranges supernet.formats.integer search.run"
        )
        parsed = ast.parse(text)
        monkeypatch.setattr(f"{__name__}.tree", lambda _: parsed)
        monkeypatch.setattr(f"{__name__}.MODULES", dict.fromkeys([*known.split(), "supernet.config"], path))
        assert imports(path, with_types=False) == set(known.split())
        assert imports(path, with_types=True) == {*known.split(), "supernet.config"}


def size(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    return lines - ((first.end_lineno or 0) - first.lineno + 1) * (ast.get_docstring(function) is not None)


def options() -> list[Path]:
    """Every YAML of a group; the doors and their parts lie at the top of `conf/`."""
    return sorted(path for path in CONF.rglob("*.yaml") if path.parent != CONF)


def targets(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from [value["_target_"]] if "_target_" in value else []
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from targets(inner)


def composed(door: str, *overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(door, list(overrides)), resolve=True)


class TestRegistry:
    @pytest.mark.parametrize("path", [*sorted(CONF.glob("*.yaml")), *options()], ids=short)
    def test_every_yaml_says_what_it_is_and_names_what_exists(self, path: Path) -> None:
        text = path.read_text()
        assert re.search(r"^# (?!@package)\w", text, re.MULTILINE), "the first comment line is the help text; write one"
        for target in targets(yaml.safe_load(text)):
            module, _, attribute = target.rpartition(".")
            found = getattr(importlib.import_module(module), attribute)
            assert f"{found.__module__}.{found.__qualname__}" == target, "name the place where it is defined"

    def test_a_group_holds_classes_or_values(self) -> None:
        kinds: dict[str, set[bool]] = {}
        for path in options():
            content = yaml.safe_load(path.read_text())
            if content:  # an option of comments only chooses nothing
                kinds.setdefault(short(path.parent), set()).add("_target_" in content)
        mixed = [group for group, found in kinds.items() if len(found) > 1]
        assert not mixed, f"{mixed}: every option needs a _target_, or none has one"

    @pytest.mark.parametrize("door", list(_DOORS))
    def test_every_door_composes(self, door: str) -> None:
        assert composed(door)

    @pytest.mark.parametrize("path", options(), ids=short)
    def test_every_option_is_offered_by_a_door_or_another_option(self, path: Path) -> None:
        group, option = path.parent.relative_to(CONF).as_posix(), path.stem
        doors = [door for door in _DOORS if group in groups(door)]
        for door in doors:
            assert composed(door, f"{group}={option}")
        named = [other for other in options() if other != path and f"{group}" in other.read_text()]
        assert doors or named or group == "format", f"nothing can choose {short(path)}: no door lists the group {group}"


class TestFiles:
    @pytest.mark.parametrize("path", all_python(), ids=short)
    def test_are_small(self, path: Path) -> None:
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{lines} lines: two rooms?"
        functions = (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        sizes = {node.name: size(node) for node in functions}
        assert not {name: count for name, count in sizes.items() if count > 50}, "50 lines of code are enough for one"
        assert path.stem not in ("utils", "helpers", "misc", "common"), "look for the missing noun"

    @pytest.mark.parametrize("path", sources(), ids=short)
    def test_say_what_is_public(self, path: Path) -> None:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        public = [node for node in tree(path).body if isinstance(node, kinds) and not node.name.startswith("_")]
        missing = [node.name for node in public if not ast.get_docstring(node)]
        assert ast.get_docstring(tree(path)), "no module docstring"
        assert not missing, f"no docstring: {missing}"

    @pytest.mark.parametrize("path", sources(), ids=short)
    def test_are_finished(self, path: Path) -> None:
        words = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|NotImplemented" r"Error)\b")
        left = [f"{n}: {line.strip()}" for n, line in enumerate(path.read_text().splitlines(), 1) if words.search(line)]
        assert not left

    def test_hold_no_paths_of_a_machine(self) -> None:
        folders = r"(?<![\w./}~])/(work|farm|root|home|Users)" r"/\w"
        registries = r"(index-url|registry)\s*=?\s*[\"']?" r"https?:"
        pattern = re.compile(f"{folders}|{registries}")
        found = [
            f"{short(path)}:{number}"
            for path in texts()
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
            if pattern.search(line)
        ]
        assert not found
