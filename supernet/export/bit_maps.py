"""Bit maps from elsewhere and for elsewhere: which layer has how many bits, into a subnet and out of it.

The forms are the options of conf/assignment, a class each; names are matched by the rules of `assignments.names`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from supernet.artefacts import read_json, write_bytes, write_json
from supernet.config import Choice, Granularity, PerChannel, PerTensor, QuantConfig, Stated, SubnetConfig, build
from supernet.elastic.supernet import SuperNet
from supernet.export.assignments.names import Names, few
from supernet.formats.integer import Integer
from supernet.interfaces import BitMapReader, BitMapWriter
from supernet.space import Dimension

CONF = Path(__file__).resolve().parents[2] / "conf" / "assignment"
USUAL: dict[str, tuple[Granularity, bool]] = {"weight": (PerChannel(), True), "input": (PerTensor(), True)}


def import_bits(
    net: SuperNet,
    source: Any,
    form: str | BitMapReader = "auto",
    *,
    default: str | None = None,
    names: Mapping[str, str | None] | None = None,
    loose: bool = False,
) -> SubnetConfig:
    """The subnet that a bit map found elsewhere describes.

    Bits are taken as they are said, never the nearest. What a map does not say of a tensor is the usual form: weights
    per channel, inputs per tensor, symmetric. Where it says nothing of a tensor at all, the only bits that the space
    has for it are taken, else those of `default`. A stage is as deep as the last of its blocks that the map names;
    with `default` it has all blocks.

    Args:
        net: the supernet.
        source: a JSON file, or its content, or the other tool's own objects.
        form: name of an option of conf/assignment, `auto`: the one that recognises it, or a reader of your own.
        default: `wXaY` for layers that the map leaves out.
        names: foreign name -> our layer, or dimension (`conv1.input`), or None: leave it out; for what the rules do not
            find.
        loose: granularity and symmetry that the space does not have give way to what it has at the same bits.

    Raises:
        ValueError: an unknown form, names that fit no layer or two, bits or forms outside the space, layers left out.
        OSError: the file cannot be read.
    """
    content = read_json(source) if isinstance(source, Path | str) else source
    said = _reader(form, content).read(content, Names(net, names))
    chosen = _depths(net, said, default)
    usual = net.space.uniform(default) if default is not None else None
    strange: list[str] = []
    silent: list[str] = []
    for dimension in _active(net, chosen):
        only = {c.bits for c in _integers(dimension)}
        stated = said.get(dimension.name) or (Stated(only.pop()) if len(only) == 1 else None)
        if stated is not None:
            found: Choice | str = _choice(net, dimension, stated, loose)
        elif usual is not None:
            found = usual[dimension.name]
        else:
            silent.append(dimension.name)
            continue
        strange += [found] if isinstance(found, str) else []
        chosen[dimension.name] = dimension.choices[0] if isinstance(found, str) else found
    if strange:
        raise ValueError(
            f"the map asks for what this space does not have: {few(strange)}; change the map, or train a space that "
            "has it" + ("" if loose else "; loose=true takes other granularities and symmetries at the same bits")
        )
    if silent:
        raise ValueError(
            f"the map says nothing of {len(silent)} tensors: {few(silent)}; give bits for them, e.g. default=w8a8"
        )
    return net.space.config(net.space.indices(chosen)[0])


def export_bits(
    net: SuperNet,
    config: SubnetConfig | Sequence[int],
    form: str | BitMapWriter,
    *,
    loose: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The bit map of a subnet in a form that others read, as JSON holds it.

    Args:
        net: the supernet.
        config: the subnet.
        form: name of an option of conf/assignment, or a writer of your own.
        loose: what the form cannot say takes the next that it can: zero-points are dropped, bits rounded up.
        options: of the form, e.g. `model="float.onnx"` for `ort`.

    Raises:
        ValueError: an unknown form, one that is only read, or a subnet that it cannot say.
    """
    writer = writer_of(form, **options) if isinstance(form, str) else form
    return writer.write(net, net.space.config(net.row(config)), loose)


def write_maps(
    net: SuperNet, config: SubnetConfig, subnet: nn.Module, out: Path, forms: Sequence[str], loose: bool = False
) -> list[Path]:
    """Write `out/<form>.json` for each form, and what it needs beside it; returns the maps' paths."""
    made = {form: (writer_of(form), export_bits(net, config, form, loose=loose)) for form in forms}
    for form, (writer, content) in made.items():
        for name, file in writer.beside(subnet, net).items():
            write_bytes(out / name, file)
        write_json(out / f"{form}.json", content)
    return [out / f"{form}.json" for form in made]


# -- forms -------------------------------------------------------------------------------------------------------------
def _named(form: str, **options: Any) -> Any:
    from omegaconf import OmegaConf

    path = CONF / f"{form}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONF.glob("*.yaml")))
        raise ValueError(f"no form of bit maps {form!r}; choose one of {known}")
    return build(OmegaConf.load(path), **options)


def writer_of(form: str, **options: Any) -> BitMapWriter:
    """The writer of an option of conf/assignment; ValueError where it is unknown or only read."""
    made = _named(form, **options)
    if not isinstance(made, BitMapWriter):
        writers = [p.stem for p in sorted(CONF.glob("*.yaml")) if isinstance(_named(p.stem), BitMapWriter)]
        raise ValueError(f"bit maps of {form} are only read; write one of {', '.join(writers)}")
    return made


def _reader(form: str | BitMapReader, content: Any) -> BitMapReader:
    """The reader that is asked for, or the one that recognises the content."""
    forms = {p.stem: _named(p.stem) for p in sorted(CONF.glob("*.yaml"))}
    readers = {name: made for name, made in forms.items() if isinstance(made, BitMapReader)}
    if form != "auto":
        made, name = (_named(form), form) if isinstance(form, str) else (form, type(form).__name__)
        if not isinstance(made, BitMapReader):
            raise ValueError(f"bit maps of {name} are only written; read one of {', '.join(readers)}")
        if not made.recognises(content):
            raise ValueError(
                f"this is no bit map of {name}: {reprlib.repr(content)}; leave the form out to have it recognised"
            )
        return made
    found = [name for name, reader in readers.items() if reader.recognises(content)]
    if len(found) != 1:
        said = f"of {' and '.join(found)} at once" if found else "of no known form"
        raise ValueError(f"a bit map {said}: {reprlib.repr(content)}; name its form, one of {', '.join(readers)}")
    return readers[found[0]]


# -- choices -----------------------------------------------------------------------------------------------------------
def _depths(net: SuperNet, said: Mapping[str, Stated], default: str | None) -> dict[str, Choice]:
    """Architecture: the least depth at which every layer runs that is spoken of; all there is, with a default."""
    chosen: dict[str, Choice] = {}
    named = [d for d in net.space.dimensions if d.quantizes and d.name in said]
    for dimension in (d for d in net.space.dimensions if not d.quantizes):
        needed = [set(allowed) for d in named for name, allowed in d.active_if if name == dimension.name]
        fits = [choice for choice in dimension.choices if all(choice in allowed for allowed in needed)]
        conditional = any(name == dimension.name for d in net.space.dimensions for name, _ in d.active_if)
        chosen[dimension.name] = fits[0] if conditional and default is None else dimension.choices[-1]
    return chosen


def _active(net: SuperNet, architecture: Mapping[str, Choice]) -> list[Dimension]:
    """Dimensions of the tensors that are quantized in an architecture."""
    row = np.zeros(len(net.space), dtype=np.int64)
    for name, choice in architecture.items():
        at = net.space.position[name]
        row[at] = net.space.dimensions[at].choices.index(choice)
    active = net.space.active(row[None])[0]
    return [d for d, on in zip(net.space.dimensions, active, strict=True) if on and d.quantizes]


def _integers(dimension: Dimension) -> list[QuantConfig]:
    return [c for c in dimension.choices if isinstance(c, QuantConfig) and isinstance(c.format, Integer)]


def _choice(net: SuperNet, dimension: Dimension, stated: Stated, loose: bool) -> QuantConfig | str:
    """The choice that is asked for; a text where there is none, with those that there are.

    An input that a site has quantized already is passed on as it is at the site's bits: its form is the site's then.
    """
    offered = _integers(dimension)
    alike = [c for c in offered if c.bits == stated.bits]
    if not alike:
        return f"{dimension.name} {stated.bits} bits (offered {', '.join(map(str, sorted({c.bits for c in offered})))})"
    layer, _, what = dimension.name.rpartition(".")
    quantizer = net.quantizers[f"{layer}.{what}_quantizer"]
    granularity, symmetric = USUAL[what]

    def distance(choice: QuantConfig) -> tuple[bool, bool]:
        wanted = stated.granularity or granularity, symmetric if stated.symmetric is None else stated.symmetric
        return choice.granularity != wanted[0], choice.symmetric != wanted[1]

    best = min(alike, key=distance)
    passed = bool(quantizer.bypass) and stated.bits >= quantizer.bypass
    kept = stated.granularity in (None, best.granularity) and stated.symmetric in (None, best.symmetric)
    if kept or passed or loose:
        return best
    wanted = (
        f"{stated.granularity or ''} {'' if stated.symmetric is None else 'a' * (not stated.symmetric) + 'symmetric'}"
    )
    return f"{dimension.name} {' '.join(wanted.split())} at {stated.bits} bits (offered {few(alike)})"
