"""Any model of timm by name, with chosen chains of blocks made elastic in depth."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from supernet.elastic.stage import Stage

log = logging.getLogger(__name__)


def timm_model(
    name: str,
    pretrained: bool | str | Path = False,
    n_classes: int | None = None,
    in_channels: int = 3,
    stages: Sequence[str] = (),
    min_depth: int = 1,
    **kwargs: Any,
) -> nn.Module:
    """`timm.create_model` with weights from timm, from a file, or fresh.

    Args:
        name: a model of timm, with or without a pretrained tag: `resnet18`, `resnet18.a1_in1k`.
        pretrained: False, True (timm downloads), or the path of a safetensors or torch file with timm's names.
            A classifier of another size in the file is left out, which the log says.
        n_classes: size of the output; None: timm's own number.
        in_channels: channels of the images.
        stages: paths of `nn.Sequential` modules to turn into a `Stage`, e.g. `[layer1, layer2]` of a ResNet, `[blocks]`
            of a ViT. Their blocks after the first must keep the shape of their input, which the SuperNet checks.
        min_depth: fewest blocks of these stages that may run.
        kwargs: passed to timm, e.g. `zero_init_last=False`.

    Raises:
        ValueError: no such model (with the nearest names), weights of another model, or no such stage.
        FileNotFoundError: weights that are not there.
    """
    import timm

    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(
            f"timm has no model {name!r}; {'nearest: ' + ', '.join(near) if near else 'timm.list_models() lists them'}"
        )
    if n_classes is not None:
        kwargs["num_classes"] = n_classes
    try:
        model = timm.create_model(name, pretrained=pretrained is True, in_chans=in_channels, **kwargs)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"timm could not make {name} with pretrained={pretrained}: {reason}; set pretrained=false or a file"
        ) from error
    if not isinstance(pretrained, bool):
        _load(model, Path(pretrained).expanduser(), name)
    for path in stages:
        _make_elastic(model, path, min_depth)
    return model


def _load(model: nn.Module, path: Path, name: str) -> None:
    from timm.models import load_state_dict

    if not path.is_file():
        raise FileNotFoundError(
            f"pretrained {path} does not exist; give a safetensors or torch file, true (download) or false"
        )
    try:
        state = load_state_dict(str(path), weights_only=True)
        own = model.state_dict()
        for key in [
            k for k in state if k.startswith(_classifier(model)) and k in own and state[k].shape != own[k].shape
        ]:
            log.warning(
                "%s: %s %s left out, the model has %s", path.name, key, list(state.pop(key).shape), list(own[key].shape)
            )
            state[key] = own[key]
        model.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, AttributeError, OSError, EOFError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"pretrained {path} does not fit {name}: {reason}; choose the model that the weights are of"
        ) from error


def _classifier(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifier's parameters, as timm states them."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier", ())
    return tuple(f"{n}." for n in ([names] if isinstance(names, str) else names or ()))


def _make_elastic(model: nn.Module, path: str, min_depth: int) -> None:
    """Put a `Stage` with the same blocks in the place of the `nn.Sequential` at `path`; parameter names stay."""
    chains = {n: m for n, m in model.named_modules() if type(m) is nn.Sequential and len(m) > 1}
    if path not in chains:
        there = ", ".join(chains) or "none"
        raise ValueError(
            f"stages must name nn.Sequential modules of two or more blocks, got {path!r}; there are {there}"
        )
    chain = chains[path]
    names = [name for name, _ in chain.named_children()]
    if names != [str(i) for i in range(len(chain))]:
        raise ValueError(f"blocks of a stage must be numbered from 0, those of {path!r} are called {', '.join(names)}")
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, Stage(*chain, min_depth=min_depth))
