"""What the command line offers, read off the folder `conf/`: help texts, groups, settings.

The first comment line of a YAML file is its description; nothing is listed by hand.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

CONF = Path(__file__).resolve().parent.parent / "conf"
_OWN = ("defaults", "hydra")
"""Top-level keys of a door's YAML that are Hydra's business, not settings."""


def overview(verbs: Sequence[str]) -> str:
    """The text of `elastibit --help`."""
    width = max(map(len, verbs))
    lines = [f"  {verb:{width}}  {describe(CONF / f'{verb}.yaml')}" for verb in verbs]
    return "\n".join(
        [
            "elastibit <verb> [key=value ...]",
            "Train one quantized supernet, search a subnet for any budget, export a file that runs.",
            "",
            *lines,
            "",
            "elastibit <verb> --help   what a verb offers      elastibit --version",
            "What follows the verb are Hydra overrides; -m sweeps over lists of values; --debug shows tracebacks.",
        ]
    )


def verb_help(verb: str) -> str:
    """The text of `elastibit <verb> --help`: its groups with their options, its settings with their defaults."""
    lines = [f"elastibit {verb} [key=value ...]", describe(CONF / f"{verb}.yaml"), ""]
    offered = groups(verb)
    if offered:
        lines += ["Groups (group=option, the default is marked *; then group.setting=value):", ""]
    for group, default in offered.items():
        lines += [f"  {group}", *_options(CONF / group, default), ""]
    body = "\n".join(_body(path.read_text()) for path in _files(verb))
    if body:
        lines += [
            "Settings (key=value; a setting of a mapping is key.name=value):",
            "",
            textwrap.indent(body, "  "),
            "",
        ]
    return "\n".join(
        [*lines, "-m sweeps over key=a,b,c; --cfg job prints the composed configuration; --debug shows tracebacks."]
    )


def groups(verb: str) -> dict[str, str | None]:
    """Groups that a door composes, with the default option of each (None: nothing is chosen)."""
    found: dict[str, str | None] = {}
    for entry in (entry for path in _files(verb) for entry in _defaults(path) if isinstance(entry, dict)):
        for key, option in entry.items():
            group = key.split(" ")[-1].split("@")[0].strip("/")
            if not group.startswith("hydra"):
                found[group] = option if isinstance(option, str) else None
    for group in list(found):
        for folder in sorted((CONF / group).rglob("*/")):
            if any(folder.glob("*.yaml")):
                found.setdefault(folder.relative_to(CONF).as_posix(), None)
    return found


def settings(verb: str, overrides: Sequence[str]) -> set[str]:
    """Every key of a door's composed configuration, dotted, inner and outer.

    Where the overrides do not compose, the keys of the configuration without them; where that does not, none.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for attempt in (list(overrides), []):
            try:
                return set(_keys(OmegaConf.to_container(compose(verb, attempt), resolve=False)))
            except HydraException:
                continue
    return set()


def can_resume(verb: str) -> bool:
    """Whether a door has the setting `resume`; the others go on by themselves."""
    return any(re.search(r"^resume:", path.read_text(), re.MULTILINE) for path in _files(verb))


def describe(path: Path) -> str:
    """The first comment line of a YAML file, without Hydra's `# @package`; nothing where there is none."""
    text = path.read_text() if path.is_file() else ""
    found = re.search(r"^# *(?!@package)(\S.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _options(folder: Path, default: str | None) -> list[str]:
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    width = max(map(len, names), default=0)
    return [
        f"    {'*' if name == default else ' '} {name:{width}}  {describe(folder / f'{name}.yaml')}".rstrip()
        for name in names
    ]


def _files(name: str) -> list[Path]:
    """A door's YAML and those that its defaults list takes in whole (`- door`)."""
    path = CONF / f"{name}.yaml"
    if not path.is_file():
        return []
    parts = [entry for entry in _defaults(path) if isinstance(entry, str) and entry != "_self_"]
    return [path, *(inner for part in parts for inner in _files(part))]


def _defaults(path: Path) -> list[Any]:
    import yaml

    return (yaml.safe_load(path.read_text()) or {}).get("defaults") or []


def _body(text: str) -> str:
    """A door's YAML as it is written, comments and all, without the file's own description and Hydra's keys."""
    kept: list[str] = []
    comments: list[str] = []
    skip = True
    for line in dropwhile(lambda line: line.startswith("#"), text.splitlines()):
        key = re.match(r"(\w+):", line)
        if key:
            skip = key[1] in _OWN
            kept += [] if skip else [*comments, line]
            comments = []
        elif line.startswith("#"):
            comments.append(line)
        elif not line.strip():
            comments = []
        elif not skip:
            kept.append(line)
    return "\n".join(kept)


def _keys(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield f"{prefix}{name}"
            yield from _keys(inner, f"{prefix}{name}.")
