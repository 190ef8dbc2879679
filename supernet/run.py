"""A run directory: written by training, read by every later stage.

    supernet.safetensors   weights, scales, BatchNorm statistics
    space.json             dimensions, fingerprint, the options that made them, provenance
    config.yaml            the resolved configuration (runs started from Hydra)

Files are plain and carry no class names, except config.yaml, whose targets go through `supernet.config.build`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from supernet.artefacts import load_tensors, provenance, read_json, save_tensors, write_json, write_text
from supernet.config import NumberFormat, build, registered
from supernet.elastic.supernet import SuperNet
from supernet.interfaces import Task

log = logging.getLogger(__name__)

WEIGHT_SOURCES = {"weights": None, "pretrained": False}
FACTORY = "supernet.backbones.python.from_factory"


@dataclass(frozen=True)
class Run:
    """A run directory in memory.

    Attributes:
        path: the directory.
        net: the supernet with its trained weights.
        task: the run's task; None where the run was made from Python objects.
        config: the resolved configuration, {} where there is none.
        trained: epochs of training behind the weights.
    """

    path: Path
    net: SuperNet
    task: Task | None
    config: dict[str, Any]
    trained: int


def save(
    net: SuperNet,
    out: Path | str,
    *,
    config: Mapping[str, Any] | None = None,
    seed: int | None = None,
    trained: int = 0,
) -> None:
    """Write the run directory; each file appears whole or not at all."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if config:
        from omegaconf import OmegaConf

        write_text(out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
    made = {"options": net.options, "example": list(net.example.shape), "audit": net.audit(), "epochs": trained}
    write_json(out / "space.json", net.space.plain() | made | {"provenance": provenance(seed)})
    tensors = {name: t.detach().cpu().contiguous() for name, t in net.state_dict().items()}
    save_tensors(out / "supernet.safetensors", tensors, {"fingerprint": net.fingerprint, "epochs": trained})


def load(
    path: Path | str,
    *,
    model: Callable[[], nn.Module] | nn.Module | None = None,
    trusted: Sequence[str] = (),
    needs_data: bool = True,
) -> Run:
    """A run directory back.

    Args:
        path: the directory.
        model: for runs that were given a module: the module, or a function that makes it.
        trusted: targets or factories of your own that the run's config may name.
        needs_data: False: a run whose data is not on this machine comes without its task, and a warning says so.

    Raises:
        FileNotFoundError: not a run directory, or its data is not there.
        ValueError: a file is broken, names what it must not, or belongs to another space.
    """
    path = Path(path)
    for name in ("space.json", "supernet.safetensors"):
        if not (path / name).exists():
            raise FileNotFoundError(
                f"{path} is not a run directory: {name} is missing; make one with `elastibit train run={path}`"
            )
    space = read_json(path / "space.json")
    config = _config(path / "config.yaml")
    task = _task(config, trusted, needs_data)
    state, metadata = load_tensors(path / "supernet.safetensors")
    module = _model(model, config, task, trusted, (space, state))
    options = space["options"] | {"formats": [_format(f) for f in space["options"]["formats"]]}
    net = SuperNet(module, torch.zeros(space["example"]), **options)
    if net.fingerprint != space["fingerprint"]:
        raise ValueError(
            f"{path} is of space {space['fingerprint']}, this model makes {net.fingerprint}; "
            "give the model that the run was made with"
        )
    if metadata.get("fingerprint") != net.fingerprint:
        raise ValueError(
            f"{path / 'supernet.safetensors'} is of space {metadata.get('fingerprint')}, "
            f"space.json of {net.fingerprint}; restore the pair"
        )
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path / 'supernet.safetensors'} does not fit the model: {reason}; "
            "give the model that the run was made with"
        ) from error
    return Run(path, net.eval(), task, config, int(space["epochs"]))


def digest(path: Path | str) -> str:
    """SHA-256 of what a run has trained: its supernet.safetensors, which equal runs share."""
    with (Path(path) / "supernet.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(net: SuperNet) -> str:
    """Sixteen hexadecimal digits of all learned values (not BatchNorm statistics): another training gives others."""
    digest = hashlib.sha256()
    for name, parameter in sorted(net.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _format(described: Mapping[str, Any]) -> NumberFormat:
    """The number format of a plain description, found by its class name among those that conf/format registers."""
    settings = {key: value for key, value in described.items() if key != "kind"}
    for target in registered():
        if target.startswith("supernet.formats.") and target.endswith(f".{described['kind']}"):
            return build({"_target_": target} | settings)
    raise ValueError(
        f"number format {described['kind']!r} is not registered; add conf/format/<name>.yaml that names its class"
    )


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise ValueError(
            f"{path} is not resolved YAML ({str(error).splitlines()[0]}); restore it from the run's origin"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} must hold a mapping of groups, got {type(config).__name__}; restore it from the run's origin"
        )
    return {str(key): value for key, value in config.items()}


def _task(config: Mapping[str, Any], trusted: Sequence[str], needs_data: bool) -> Task | None:
    """The run's task; None where it has none, or where its data is missing and not needed."""
    if "task" not in config:
        return None
    try:
        made: Task = rebuild(config["task"], trusted=trusted)
    except FileNotFoundError as error:
        if needs_data:
            raise
        log.warning("going on without the run's data, nothing is measured: %s", " ".join(str(error).split()))
        return None
    return made


def _model(
    model: Callable[[], nn.Module] | nn.Module | None,
    config: dict[str, Any],
    task: Task | None,
    trusted: Sequence[str],
    stored: tuple[Mapping[str, Any], Mapping[str, Tensor]],
) -> nn.Module:
    """The module of a run: given, or by its configuration; where there is no task, the stored tensors say how many
    classes there are (rows of the last layer)."""
    if isinstance(model, nn.Module):
        return model
    if model is not None:
        return model()
    node = config.get("backbone")
    if node is None or "task" not in config:
        raise ValueError(
            "this run was made from a module, not from a configuration; "
            "pass model=<the module or a function that makes it>"
        )
    known = {key: value for key, value in WEIGHT_SOURCES.items() if key in node}
    if task is not None:
        return rebuild(node | known, trusted=trusted, n_classes=task.n_classes, in_channels=task.in_channels)
    space, state = stored
    last = [d["name"] for d in space["dimensions"] if d["name"].endswith(".weight")][-1]
    return rebuild(
        node | known, trusted=trusted, n_classes=len(state[f"model.{last}"]), in_channels=space["example"][1]
    )


def rebuild(node: Any, /, *, trusted: Sequence[str] = (), **extra: Any) -> Any:
    """`build` for what a run has stored, after the check that it calls no function of somebody's own unasked.

    Raises:
        ValueError: a factory, wherever in the node it stands, that `trusted` does not name; and as `build`.
    """
    for factory in _factories(node):
        if factory not in trusted:
            raise ValueError(
                f"the run's config names a factory of its own, {factory!r}; allow it with trust=[{factory}]"
            )
    return build(node, trusted=trusted, **extra)


def _factories(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        if node.get("_target_") == FACTORY:
            yield node.get("factory")
        for value in node.values():
            yield from _factories(value)
    elif isinstance(node, list):
        for value in node:
            yield from _factories(value)
