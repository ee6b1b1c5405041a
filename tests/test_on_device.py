"""Which files tests/on_device.py takes for those of tests, and which for the library's."""

from __future__ import annotations

from pathlib import Path

import torch

import twofour
from tests.on_device import is_of_test


def test_the_library_is_told_from_tests_wherever_it_is_installed() -> None:
    package = Path(twofour.__file__).resolve().parent
    assert is_of_test(str(package / "nn" / "linear.py")) is False
    assert is_of_test(str(package / "testing" / "tolerances.py")) is False
    assert is_of_test(str(package / "testing" / "cases.py")) is True  # makes what tests ask for
    assert is_of_test(__file__) is True
    assert is_of_test(torch.__file__) is None
