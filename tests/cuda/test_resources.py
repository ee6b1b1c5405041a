"""Counters of launches: shared by the kernels of a stream, never by those of CUDA graphs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch

from twofour.kernels.cuda import resources

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_of_streams", {})
    monkeypatch.setattr(resources, "_reserves", {})
    monkeypatch.setattr(resources, "_RESERVE", 100)


def places(*tensors: torch.Tensor) -> list[tuple[int, int]]:
    """Where each begins and ends, in memory."""
    return sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors)


def test_launches_of_a_stream_share_theirs() -> None:
    first = resources.counters(DEVICE, 7)
    assert first is resources.counters(DEVICE, len(first))
    assert not first.any()
    more = resources.counters(DEVICE, len(first) + 1)
    assert len(more) == len(first) + 1
    assert resources.counters(DEVICE, 7) is more


def test_each_launch_in_a_graph_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = resources.counters(DEVICE, 7)
    monkeypatch.setattr(resources, "_captures", lambda _: True)
    held = [shared, *(resources.counters(DEVICE, 30) for _ in range(3))]
    held.append(resources.counters(DEVICE, 30))  # more than the reserve still has
    held.append(resources.counters(DEVICE, 10))  # what it still has
    assert [len(each) for each in held[1:]] == [30, 30, 30, 30, 10]
    assert not any(each.any() for each in held)
    ends = places(*held)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))


def test_a_graph_captured_before_anything_ran_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_captures", lambda _: True)
    one, other = resources.counters(DEVICE, 5), resources.counters(DEVICE, 5)
    assert len(one) == len(other) == 5
    assert one.data_ptr() != other.data_ptr()
    assert not resources._of_streams


@pytest.mark.parametrize("current", [0, 1])
def test_a_capture_is_looked_for_on_the_device_of_the_launch(current: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at = [current]

    @contextlib.contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        before, at[0] = at[0], device.index or 0
        yield
        at[0] = before

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: at[0])
    monkeypatch.setattr(resources, "_GET_DEVICE", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: at[0] == 1)
    assert resources._captures(torch.device("cuda", 1))
    assert not resources._captures(torch.device("cuda", 0))
    assert not resources._captures(torch.device("cpu"))
    assert at == [current]
