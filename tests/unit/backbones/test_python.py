"""Networks of the user's own: what is passed, where it is looked for, what is refused."""

import sys

import pytest
import torch

from supernet.backbones.python import from_factory

SOURCE = """
import torch

def make(n_classes, width=4):
    import {name}_helper  # found only while the working directory is importable
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(width, n_classes * {name}_helper.FACTOR))

def plain():
    return torch.nn.Identity()

def anything(**kwargs):
    assert kwargs == {{"width": 7}}, kwargs
    return torch.nn.Identity()

def number(in_channels):
    return in_channels

value = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module in the working directory, and the working directory it is in."""
    name = f"net_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE.format(name=name))
    (tmp_path / f"{name}_helper.py").write_text("FACTOR = 2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    yield name
    for made in (name, f"{name}_helper"):
        sys.modules.pop(made, None)


def test_function_gets_what_it_has_parameters_for(module):
    net = from_factory(f"{module}:make", n_classes=5, in_channels=3, width=6)
    assert net(torch.randn(2, 6, 1)).shape == (2, 10)
    assert isinstance(from_factory(f"{module}:plain", n_classes=5, in_channels=3), torch.nn.Identity)
    assert isinstance(from_factory(f"{module}:anything", n_classes=5, width=7), torch.nn.Identity)


def test_path_is_as_before(module):
    before = list(sys.path)
    from_factory(f"{module}:make", n_classes=5)
    with pytest.raises(ValueError, match="cannot be called"):
        from_factory(f"{module}:make")
    assert sys.path == before


def test_files_of_the_working_directory_do_not_hide_ours(module, tmp_path):
    (tmp_path / "search.py").write_text("raise RuntimeError('hidden')")
    (tmp_path / f"{module}_user.py").write_text("import search, torch\ndef make(): return torch.nn.Identity()")
    assert isinstance(from_factory(f"{module}_user:make"), torch.nn.Identity)


@pytest.mark.parametrize("factory", ["my_pkg", "my_pkg:", ":make", ""])
def test_malformed_names(factory):
    with pytest.raises(ValueError, match=r"must be module:function, e.g. my_pkg:make"):
        from_factory(factory)


def test_what_cannot_be_made_says_why(module, tmp_path):
    with pytest.raises(ValueError, match=r"importing no_such_module_here failed: ModuleNotFoundError.*looked in"):
        from_factory("no_such_module_here:make")
    (tmp_path / f"{module}_broken.py").write_text("1 / 0")
    with pytest.raises(ValueError, match="failed: ZeroDivisionError: division by zero"):
        from_factory(f"{module}_broken:make")
    for name in ("absent", "value"):
        with pytest.raises(ValueError, match=f"{module}.py.* has no function '{name}'"):
            from_factory(f"{module}:{name}")
    with pytest.raises(ValueError, match=r"make\(n_classes, width=4\) cannot be called with \['depth', 'n_classes'\]"):
        from_factory(f"{module}:make", n_classes=5, depth=3)
    with pytest.raises(TypeError, match=r"number must return a torch.nn.Module, got int"):
        from_factory(f"{module}:number", in_channels=3)
