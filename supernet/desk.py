"""The front desk behind every door: runs a door under Hydra and turns what goes wrong into one line and an exit code.

    0    done
    1    a written file failed its verification, or a bug in elastibit
    2    bad input: the rule, the values and the way out, in one line
    130  interrupted

`elastibit <verb>` and `python -m <package>` both come through here, so they behave alike. Hydra is loaded only when it
is needed.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supernet.artefacts import VerificationError, command
from supernet.memory import keep_freed

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("supernet", "predictors", "search", "conf", "elastibit")

BAD_INPUT = 2
FAILURE = 1
INTERRUPTED = 130


class _Carried(BaseException):
    """Takes a door's exception past Hydra, which would print a line of its own about an Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def desk(verb: str, main: Callable[[DictConfig], Any], words: Sequence[str] | None = None) -> int:
    """Run the door `main` of `verb` with the configuration `conf/<verb>.yaml`, and return the exit code.

    Args:
        verb: the door's name, which is also the name of its configuration.
        main: takes the composed configuration; may be decorated with `hydra.main` or not.
        words: what follows the verb on the command line; default `sys.argv[1:]`. `--debug` shows tracebacks.
    """
    from supernet.guide import verb_help

    words = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if {"-h", "--help"} & set(words):
        print(verb_help(verb))
        return 0
    try:
        _open(verb, main, words)
    except KeyboardInterrupt:
        return _interrupted(verb)
    except SystemExit as leave:
        # Lightning answers Ctrl-C by an orderly shutdown that ends in sys.exit(1).
        return _interrupted(verb) if isinstance(leave.__context__, KeyboardInterrupt) else _code(leave)
    except (Exception, _Carried) as caught:
        error = caught.error if isinstance(caught, _Carried) else caught
        if debug:
            traceback.print_exception(error)
        code, message = explain(error, verb, words)
        return say(message, code)
    return 0


def say(message: str, code: int) -> int:
    """Print `elastibit: message` on standard error and give `code` back."""
    print(f"elastibit: {message}", file=sys.stderr)
    return code


def close_match(word: str, known: Iterable[str]) -> str:
    """` (did you mean x or y?)` for the names nearest to `word`, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def own_packages() -> None:
    """Make `conf`, `predictors` and `search` ours, also in a folder that holds a `conf/` or a `search.py` of its own.

    `python -m` puts the current folder first on the path, where Hydra's `pkg://conf` would find the wrong one. The
    current folder goes to the end instead, also for the console script, so that `backbone.factory=my_module:make` finds
    the user's module either way.
    """
    for name in ("conf", "predictors", "search"):
        folder = ROOT / name
        if str(folder) not in getattr(sys.modules.get(name), "__path__", ()):
            spec = importlib.util.spec_from_file_location(
                name, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            assert spec is not None and spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
    here = str(Path.cwd())
    sys.path[:] = [entry for entry in sys.path if entry not in ("", here)] + [here]


def _open(verb: str, main: Callable[[DictConfig], Any], words: list[str]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints several lines and leaves, and nothing reaches us
    keep_freed()
    own_packages()
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    words = _sorted(verb, words)
    typed = sys.argv

    def job(cfg: DictConfig) -> Any:
        sys.argv = typed  # Lightning starts the other processes of a DDP run with it; files record it
        try:
            return main(cfg)
        except Exception as error:
            _drop_empty(Path(HydraConfig.get().runtime.output_dir))
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # the other jobs of a sweep still run, and Hydra says which one failed
            raise _Carried(error) from error

    job.__module__ = f"elastibit.{verb}"  # Hydra names the job, and its log file, after the module
    sys.argv = [typed[0], *words]
    try:
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name=verb)(job)()
    finally:
        sys.argv = typed


def _drop_empty(folder: Path) -> None:
    """Take away the output folder that Hydra made, where the door failed before it wrote anything."""
    if folder != Path.cwd():
        with contextlib.suppress(OSError):
            folder.rmdir()


def _sorted(verb: str, words: list[str]) -> list[str]:
    """Overrides before options, since Hydra's parser refuses `run=a -m epochs=1,2`; what is neither, in one line."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> None:
        raise ValueError(f"{message}; settings are written key=value without dashes, {_look(verb)}")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign, assignment]
    overrides = parser.parse_intermixed_args(words).overrides
    return [*overrides, *(word for word in words if word not in overrides)]


def _interrupted(verb: str) -> int:
    from supernet.guide import can_resume

    words = [word for word in sys.argv if word != "--debug"]
    if can_resume(verb):  # such a run keeps the settings it was started with, they are not given again
        words = [word for word in words if re.match(r"run=|trust=", word) or "=" not in word] + ["resume=true"]
    return say(f"interrupted; what is complete is on disk, go on with: {command(words)}", INTERRUPTED)


def _code(leave: SystemExit) -> int:
    if leave.code is None or isinstance(leave.code, int):
        return leave.code or 0
    return say(str(leave.code), FAILURE)


# -- what went wrong, in one line --------------------------------------------------------------------------------------


def explain(error: BaseException, verb: str, words: Sequence[str] = ()) -> tuple[int, str]:
    """Exit code and message for an exception that left a door."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__  # what the constructor itself said
    if isinstance(error, VerificationError):
        return FAILURE, str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return BAD_INPUT, _configuration(error, verb, words)
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] not in PACKAGES:
        return BAD_INPUT, f"{error.name} is needed here and is not installed; install it, or choose what works without"
    if isinstance(error, OSError) and error.strerror:
        return BAD_INPUT, f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    if isinstance(error, ValueError | TypeError | OSError):
        return BAD_INPUT, _one_line(error) or type(error).__name__
    text = f"unexpected {type(error).__name__}: {_one_line(error)[:400]}"
    return FAILURE, f"{text}; this is a bug in elastibit, please report it with the traceback that --debug shows"


def _configuration(error: BaseException, verb: str, words: Sequence[str]) -> str:
    """What Hydra and OmegaConf say in several lines, with the way out."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import MissingMandatoryValue

    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r} as key=value; in a shell, quote words with brackets, commas or spaces"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        hint = close_match(option, error.options)
        return f"no option {option!r} in group {group}{hint}; choose one of {', '.join(sorted(error.options))}"
    if isinstance(error, MissingMandatoryValue):
        key = getattr(error, "full_key", None) or "a setting"
        return f"{key} has no default; add {key}=..., {_look(verb)}"
    unknown = re.search(r"Could not (?:override|delete from config\.) '([^'@]+)", str(error))
    if unknown:
        return _unknown_setting(unknown[1], verb, words)
    return f"{_one_line(error)}; {_look(verb)}"


def _unknown_setting(key: str, verb: str, words: Sequence[str]) -> str:
    from supernet.guide import groups, settings

    first = key.split(".")[0]
    if verb != "train" and first in settings("train", ()) | groups("train").keys():
        return f"{key} cannot be set in {verb}: it is fixed by `elastibit train`; train another run to change it"
    others = [word for word in words if re.match(r"[\w~+]", word) and word.lstrip("+~").split("=")[0] != key]
    hint = close_match(key, settings(verb, others) | groups(verb).keys())
    return f"{verb} has no setting {key!r}{hint}; {_look(verb)}"


def _look(verb: str) -> str:
    return f"`elastibit {verb} --help` lists what there is"


def _one_line(error: BaseException) -> str:
    """The message without the lines that OmegaConf and Hydra add for themselves."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not re.match(r"(full_key|object_type|reference_type)[:=]", line))
