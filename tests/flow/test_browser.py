"""The report in a real browser: its plots are drawn, in light and in dark."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--virtual-time-budget=10000 --window-size=1100,3000"
)


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed; one of {', '.join(NAMES)} draws the report for this test")
    return found


def drawn(browser: str, page: Path, profile: Path, *flags: str) -> str:
    """The document after its scripts have run."""
    line = [browser, *FLAGS.split(), *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
    return re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)


def plots(document: str) -> dict[str, str]:
    """What stands in the element of each plot, by its id."""
    parts = re.split(r'<div[^>]* id="(plot-[\w-]+)"|<div id="(plot-[\w-]+)"', document)
    return {(parts[i] or parts[i + 1]): parts[i + 2] for i in range(1, len(parts) - 2, 3)}


def test_every_plot_is_drawn(browser: str, flow: Any, tmp_path: Path) -> None:
    run, _ = flow
    found = plots(drawn(browser, run / "report.html", tmp_path / "profile"))
    expected = {"plot-front-bitops", "plot-front-bytes", "plot-bits", "plot-predictor", "plot-accuracy", "plot-loss"}
    assert found.keys() == expected
    for name, inside in found.items():
        assert 'class="main-svg"' in inside, name
        if name == "plot-bits":
            assert inside.count("<image") == 2, "two heat maps"
        else:
            assert re.search(r'class="point"|class="js-line"', inside), f"{name} has axes and nothing in them"
    assert found["plot-front-bitops"].count('class="point"') >= 4, "two winners, each with what it has to beat"
    assert "w8a8-6kB" in found["plot-bits"], "the budgets name the rows"


def test_the_plots_follow_the_page_into_the_dark(browser: str, flow: Any, tmp_path: Path) -> None:
    run, _ = flow
    dark = ("--blink-settings=preferredColorScheme=0",)
    texts = []
    for name, flags in (("light", ()), ("dark", dark)):
        inside = plots(drawn(browser, run / "report.html", tmp_path / name, *flags))["plot-loss"]
        texts.append(re.findall(r"fill: (rgb\([\d, ]+\))", inside))
    light, night = ({tuple(map(int, re.findall(r"\d+", color))) for color in colors} for colors in texts)
    assert (27, 31, 36) in light and (27, 31, 36) not in night
    assert (231, 234, 238) in night
