"""How threads wait is settled before torch is loaded, and settings of the user's own are kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cli.test_workers import ROOT

LOOKS = """
import os, sys
from lorafold.cli import main
main.run = lambda arguments: print("torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT"))
main.main()
"""


@pytest.mark.parametrize(
    ("given", "seen"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_waiting_threads_leave_the_core(given: dict[str, str], seen: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    values = {name: value for name, value in os.environ.items() if name not in names}
    values |= {"PYTHONPATH": str(ROOT), **given}
    ran = subprocess.run([sys.executable, "-c", LOOKS], env=values, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", seen]
