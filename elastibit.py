"""One-shot quantization supernets: train once, search a subnet for any budget, export a file that runs.

    import elastibit as eb

The names below are loaded on first use, so that the import itself takes no torch, timm, Lightning or wandb along. The
console command `elastibit <verb> [key=value ...]` starts here too.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.desk import BAD_INPUT, close_match, desk, say
from supernet.guide import overview

if TYPE_CHECKING:
    from omegaconf import DictConfig

__version__ = "0.1.0"

_NAMES = {
    "Integer": "supernet.formats.integer:Integer",
    "PerChannel": "supernet.config:PerChannel",
    "PerTensor": "supernet.config:PerTensor",
    "QuantConfig": "supernet.config:QuantConfig",
    "SearchSpace": "supernet.space:SearchSpace",
    "SubnetConfig": "supernet.config:SubnetConfig",
    "SuperNet": "supernet.elastic.supernet:SuperNet",
    "collect": "predictors.pairs:collect",
    "constrained": "search.views:constrained",
    "export": "supernet.export.bundle:export",
    "export_bits": "supernet.export.bit_maps:export_bits",
    "finetune": "supernet.training.finetune:finetune",
    "fit_predictor": "predictors.accuracy:fit_predictor",
    "import_bits": "supernet.export.bit_maps:import_bits",
    "load": "supernet.run:load",
    "recalibrate": "supernet.calibration.batchnorm:recalibrate",
    "search": "search.run:search",
    "train": "supernet.training.fit:train",
}

_DOORS = {
    "train": "supernet.__main__",
    "predict": "predictors.__main__",
    "probe": "supernet.export.probe",
    "search": "search.__main__",
    "finetune": "search.finetune",
    "export": "supernet.export.__main__",
    "report": "search.report",
    "demo": "search.demo",
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"elastibit has no name {name!r}{close_match(name, _NAMES)}")
    module, attribute = _NAMES[name].split(":")
    top = importlib.import_module(module.partition(".")[0])
    if Path(top.__path__[0] if hasattr(top, "__path__") else str(top.__file__)).parent != Path(__file__).parent:
        raise ImportError(
            f"{top.__file__} hides elastibit's package {top.__name__!r}; rename it, or start from another folder"
        )
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])


def main(words: Sequence[str] | None = None) -> int:
    """The console command; returns its exit code. `words` default to the command line."""
    words = list(sys.argv[1:] if words is None else words)
    verb = next((word for word in words if word != "--debug"), "--help")
    if verb in ("-h", "--help"):
        print(overview(list(_DOORS)))
        return 0
    if verb == "--version":
        print(f"elastibit {__version__}")
        return 0
    if verb not in _DOORS:
        return say(f"no verb {verb!r}{close_match(verb, _DOORS)}; choose one of {', '.join(_DOORS)}", BAD_INPUT)
    words.remove(verb)

    def door(cfg: DictConfig) -> Any:
        return importlib.import_module(_DOORS[verb]).main(cfg)

    return desk(verb, door, words)


if __name__ == "__main__":
    sys.exit(main())
