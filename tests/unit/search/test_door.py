"""How settings become budgets."""

from __future__ import annotations

from typing import Any

import pytest

from search.__main__ import budgets_of

NONE = {"bitops": None, "bytes": None, "macs": None}


class TestBudgetsOf:
    @pytest.mark.parametrize(
        ("budget", "budgets", "expected"),
        [
            ({"bitops": "w3a3"}, [], [{"bitops": "w3a3"}]),
            ({"bitops": ["w3a3", "2.5M"]}, [], [{"bitops": "w3a3"}, {"bitops": "2.5M"}]),
            (
                {"bitops": ["w3a3", "w4a4"], "bytes": "9kB"},
                [],
                [{"bitops": "w3a3", "bytes": "9kB"}, {"bitops": "w4a4", "bytes": "9kB"}],
            ),
            (
                {"bitops": ["w3a3", "w4a4"], "bytes": [1, 2]},
                [],
                [{"bitops": "w3a3", "bytes": 1}, {"bitops": "w4a4", "bytes": 2}],
            ),
            ({"bitops": ["w3a3"], "bytes": 5.0}, [], [{"bitops": "w3a3", "bytes": 5.0}]),
            ({}, [{"bitops": "w3a3"}, {"bytes": 7, "macs": 3}], [{"bitops": "w3a3"}, {"bytes": 7, "macs": 3}]),
        ],
    )
    def test_lists_are_zipped_and_scalars_apply_to_all(self, budget: Any, budgets: Any, expected: Any) -> None:
        assert budgets_of(NONE | budget, budgets) == expected

    @pytest.mark.parametrize(
        ("budget", "budgets", "said"),
        [
            ("w3a3", [], "names its kind"),
            (["w3a3"], [], "names its kind"),
            (NONE, ["w3a3"], "names its kind"),
            (NONE, "w3a3", "names its kind"),
            (NONE, [], "neither was given"),
            (NONE | {"bytes": 3}, [{"macs": 3}], "both were given"),
            (NONE | {"bytes": []}, [], r"budget\.bytes has 0"),
            (NONE | {"bytes": [1, 2], "macs": [1]}, [], r"budget\.bytes has 2, budget\.macs has 1"),
        ],
    )
    def test_what_names_no_limits_is_refused(self, budget: Any, budgets: Any, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            budgets_of(budget, budgets)
