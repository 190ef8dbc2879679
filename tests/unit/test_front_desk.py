"""What goes wrong behind a door is one line and an exit code; ours is found before the user's."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import elastibit
from supernet import guide
from supernet.artefacts import VerificationError
from supernet.desk import desk

YAML = {
    "weave.yaml": """
        # Weaves something for a test.
        defaults:
          - workshop
          - yarn: wool
          - optional loom@machine.loom: null
          - override hydra/job_logging: none
          - override hydra/hydra_logging: none
          - _self_

        # where it goes
        run: ???
        rows: 3    # whole passes
        resume: false
        rate:
          warp: 0.1

        # Hydra's own
        hydra:
          output_subdir: null
          run: {dir: out}
          sweep: {dir: out, subdir: "job${hydra.job.num}"}
    """,
    "workshop.yaml": """
        # What every door has.
        seed: 7      # of all draws
    """,
    "train.yaml": """
        defaults: [{fleece: sheep}, _self_]
        length: 5
    """,
    "sell.yaml": """
        defaults:
          - override hydra/job_logging: none
          - _self_
        price: 20
        hydra: {output_subdir: null, run: {dir: out}}
    """,
    "yarn/wool.yaml": """
        # @package yarn
        # warm and heavy
        plies: 1
    """,
    "yarn/linen.yaml": """
        # cool and strong
        plies: 4
    """,
    "loom/hand.yaml": """
        name: hand
    """,
    "fleece/sheep.yaml": """
        weight: 3
    """,
}

Answer = tuple[int, str, str]
Desk = Callable[..., Answer]


def lay(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text).lstrip("\n"))
    return folder


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of its own, so that these tests do not depend on what the real doors offer."""
    folder = lay(tmp_path / "registry", YAML)
    monkeypatch.setattr(guide, "CONF", folder)
    return folder


@pytest.fixture
def at_desk(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Desk]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(main: Callable[[DictConfig], Any], *words: str, verb: str = "weave") -> Answer:
        typed = ["/usr/bin/elastibit", verb, *words, "--config-dir", str(conf)]
        monkeypatch.setattr(sys, "argv", typed)
        code = desk(verb, main, typed[2:])
        assert sys.argv is typed
        return code, *capsys.readouterr()

    yield run


def raises(error: BaseException) -> Callable[[DictConfig], None]:
    def main(cfg: DictConfig) -> None:
        raise error

    return main


class TestRunning:
    def test_door_gets_the_composed_configuration_and_the_command_line_as_typed(self, at_desk: Desk) -> None:
        seen: dict[str, Any] = {}

        def main(cfg: DictConfig) -> None:
            seen.update(
                cfg=cfg, argv=sys.argv, name=HydraConfig.get().job.name, out=HydraConfig.get().runtime.output_dir
            )

        assert at_desk(main, "rows=5", "run=a", "yarn=linen", "--debug") == (0, "", "")
        assert (seen["cfg"].rows, seen["cfg"].yarn.plies, seen["name"]) == (5, 4, "weave")
        assert seen["argv"][:3] == ["/usr/bin/elastibit", "weave", "rows=5"]
        assert Path(seen["out"]) == Path.cwd() / "out"

    def test_a_sweep_gives_each_job_a_folder(self, at_desk: Desk) -> None:
        folders: list[str] = []

        def main(cfg: DictConfig) -> None:
            folders.append(f"{cfg.rows} {Path(HydraConfig.get().runtime.output_dir).relative_to(Path.cwd())}")

        assert at_desk(main, "run=a", "-m", "rows=1,2")[0] == 0
        assert folders == ["1 out/job0", "2 out/job1"]

    def test_one_bad_job_of_a_sweep_does_not_stop_the_others(self, at_desk: Desk) -> None:
        done: list[int] = []

        def main(cfg: DictConfig) -> None:
            if cfg.rows == 1:
                raise ValueError("rows must be even, got 1")
            done.append(cfg.rows)

        code, _, err = at_desk(main, "run=a", "-m", "rows=1,2")
        assert (code, done) == (2, [2])
        assert err.splitlines()[-1] == "elastibit: rows must be even, got 1"

    def test_a_door_decorated_for_hydra_works_too(self, at_desk: Desk) -> None:
        import hydra

        seen: list[int] = []
        main = hydra.main(version_base="1.3", config_path="pkg://conf", config_name="weave")(
            lambda c: seen.append(c.rows)
        )
        assert at_desk(main, "run=a")[0] == 0
        assert seen == [3]


class TestBadInput:
    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (
                ValueError("group size 3 does not divide 64;\n  choose one of 1, 2"),
                "group size 3 does not divide 64; choose",
            ),
            (TypeError("bits must be a whole number, got 'four'"), "bits must be a whole number, got 'four'"),
            (FileNotFoundError("no run at runs/a; train one first"), "no run at runs/a; train one first"),
            (FileNotFoundError(2, "No such file or directory", "runs/a"), "No such file or directory: runs/a"),
            (OSError(28, "No space left on device"), "No space left on device"),
            (ModuleNotFoundError("No module named 'x.y'", name="x.y"), "x.y is needed here and is not installed"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_a_door_says_is_one_line(self, at_desk: Desk, error: Exception, line: str) -> None:
        code, out, err = at_desk(raises(error), "run=a")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"elastibit: {line}")

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (["rowz=4"], r"weave has no setting 'rowz' \(did you mean rows\?\); `elastibit weave --help` lists"),
            (["rate.wrap=4"], r"weave has no setting 'rate\.wrap' \(did you mean rate\.warp.*\?\); .*"),
            (["yarn=linen", "yarn.plys=4"], r"weave has no setting 'yarn\.plys' .*yarn\.plies.*"),
            (
                ["yarn=linnen"],
                r"no option 'linnen' in group yarn \(did you mean linen\?\); choose one of linen, wool$",
            ),
            (["cotton=4"], r"weave has no setting 'cotton'; `elastibit weave --help` lists"),
            (["rows"], r"cannot read 'rows' as key=value"),
            (["budget=[w3a3"], r"cannot read 'budget=\[w3a3' as key=value"),
            (["--rows=4"], r"unrecognized arguments: --rows=4; settings are written key=value without dashes"),
            (["~row"], r"weave has no setting 'row' \(did you mean rows.*\?\)"),
        ],
        ids=str,
    )
    def test_overrides(self, at_desk: Desk, words: list[str], line: str) -> None:
        code, out, err = at_desk(raises(AssertionError("the door was opened")), *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert re.match(f"elastibit: {line}", err), err
        assert not Path("out").exists()

    def test_a_missing_value_is_named(self, at_desk: Desk) -> None:
        code, _, err = at_desk(lambda cfg: cfg.run)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith("elastibit: run has no default; add run=...")

    @pytest.mark.parametrize("word", ["fleece=sheep", "length=4", "fleece.weight=2"])
    def test_what_training_fixed_cannot_be_set_later(self, at_desk: Desk, word: str) -> None:
        code, _, err = at_desk(raises(AssertionError("the door was opened")), word, verb="sell")
        assert (code, err.count("\n")) == (2, 1)
        assert "is fixed by `elastibit train`" in err

    def test_what_a_constructor_says_comes_out_of_instantiate(self, at_desk: Desk) -> None:
        def main(cfg: DictConfig) -> None:
            from hydra.utils import instantiate

            instantiate({"_target_": "fractions.Fraction", "numerator": "three"})

        code, _, err = at_desk(main, "run=a")
        assert (code, err) == (2, "elastibit: Invalid literal for Fraction: 'three'\n")

    def test_debug_shows_the_traceback_and_then_the_line(self, at_desk: Desk) -> None:
        code, _, err = at_desk(raises(ValueError("bits must be 2..8, got 9")), "run=a", "--debug")
        assert code == 2
        assert "Traceback" in err
        assert "in raises" in err or "in main" in err
        assert err.endswith("\nelastibit: bits must be 2..8, got 9\n")


class TestOtherEnds:
    def test_a_failed_verification_shows_its_table(self, at_desk: Desk) -> None:
        table = "2 of 40 layers differ\nconv1  3 codes\nconv2  1 code"
        assert at_desk(raises(VerificationError(table)), "run=a") == (1, "", f"elastibit: {table}\n")

    def test_anything_else_is_a_bug_of_ours(self, at_desk: Desk) -> None:
        code, _, err = at_desk(raises(KeyError("scale")), "run=a")
        assert (code, err.count("\n")) == (1, 1)
        assert re.match(r"elastibit: unexpected KeyError: 'scale'; this is a bug in elastibit, .* --debug shows", err)

    def test_an_interruption_says_how_to_go_on(self, at_desk: Desk) -> None:
        code, _, err = at_desk(raises(KeyboardInterrupt()), "run=a", "rows=2")
        assert (code, err.count("\n")) == (130, 1)
        # A resumed run keeps its settings, so they are not repeated.
        assert re.search(r"go on with: elastibit weave run=a --config-dir \S+ resume=true$", err)

    def test_an_interruption_of_lightning_is_one_too(self, at_desk: Desk) -> None:
        def main(cfg: DictConfig) -> None:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                sys.exit(1)

        code, _, err = at_desk(main, verb="sell")
        assert code == 130
        assert "go on with: elastibit sell" in err
        assert "resume" not in err

    @pytest.mark.parametrize(("leave", "code"), [(None, 0), (0, 0), (3, 3), ("no luck", 1)])
    def test_a_door_may_leave_by_itself(self, at_desk: Desk, leave: Any, code: int) -> None:
        assert at_desk(raises(SystemExit(leave)), "run=a")[0] == code


class TestHelp:
    def test_of_a_verb_is_read_off_the_registry(self, at_desk: Desk) -> None:
        code, out, err = at_desk(raises(AssertionError("the door was opened")), "--help")
        assert (code, err) == (0, "")
        assert "Weaves something for a test." in out
        assert re.search(r"^ +\* wool +warm and heavy$", out, re.MULTILINE)
        assert re.search(r"^ +linen +cool and strong$", out, re.MULTILINE)
        assert re.search(r"^ +hand$", out, re.MULTILINE)
        assert (
            "  # where it goes\n  run: ???\n  rows: 3    # whole passes\n  resume: false\n  rate:\n    warp: 0.1\n"
            in out
        )
        assert "  seed: 7      # of all draws\n" in out
        assert "What every door has" not in out
        assert "hydra:" not in out
        assert "defaults" not in out


DOOR = """
    import json, sys, time
    from pathlib import Path
    from supernet.desk import desk

    def main(cfg):
        import conf, predictors, search, mine
        from hydra.core.hydra_config import HydraConfig
        if cfg.rows == 0:
            print("ready", flush=True)
            time.sleep(60)
        if cfg.rows < 0:
            raise ValueError(f"rows >= 0, got {cfg.rows}")
        found = {m.__name__: m.__file__ for m in (conf, predictors, search, mine)}
        Path(HydraConfig.get().runtime.output_dir, "found.json").write_text(json.dumps(found))

    if __name__ == "__main__":
        sys.exit(desk("weave", main))
"""


class TestProcesses:
    """The same from outside, in a folder that holds a `conf/`, a `search.py` and a module of the user's."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        lay(tmp_path / "registry", YAML)
        foreign = {"conf/weave.yaml": "wrong: true", "conf/__init__.py": "raise RuntimeError('wrong conf')"}
        lay(tmp_path, foreign | {"search.py": "raise RuntimeError('wrong search')", "mine.py": "", "door.py": DOOR})
        return tmp_path

    def run(self, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "door", "--config-dir", "registry", "run=a", *words]
        return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=60, check=False)

    def test_ours_are_found_first_and_the_users_too(self, folder: Path) -> None:
        done = self.run(folder, "-m", "rows=1,2")
        assert done.returncode == 0, done.stderr
        for job in ("job0", "job1"):
            found = json.loads((folder / "out" / job / "found.json").read_text())
            root = Path(elastibit.__file__).parent
            assert {Path(found[name]).parent.parent for name in ("conf", "predictors", "search")} == {root}
            assert Path(found["mine"]) == folder / "mine.py"

    def test_an_error_is_one_line_and_leaves_nothing(self, folder: Path) -> None:
        done = self.run(folder, "rows=-1")
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "elastibit: rows >= 0, got -1\n")
        assert not (folder / "out").exists()

    def test_an_interruption(self, folder: Path) -> None:
        line = [sys.executable, "-m", "door", "--config-dir", "registry", "run=a", "rows=0"]
        with subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as door:
            assert door.stdout is not None
            first = door.stdout.readline()
            door.send_signal(signal.SIGINT)
            _, err = door.communicate(timeout=30)
        assert first == "ready\n"
        assert (door.returncode, err.count("\n")) == (130, 1)

    def test_console_script(self, folder: Path) -> None:
        script = Path(sys.executable).with_name("elastibit")
        if not script.is_file():
            pytest.skip("the console script is not installed beside this Python")
        done = subprocess.run(
            [script, "train", "epochz=1"], cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith("elastibit: train has no setting 'epochz'")
        assert done.stderr.count("\n") == 1
