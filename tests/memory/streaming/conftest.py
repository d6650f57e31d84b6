"""Buses that check every access, in place of the one that a CPU has."""

import pytest
from helpers.recording_bus import RecordingBus

from lowmem_npo.memory import streaming


@pytest.fixture(params=[False, True], ids=["early copies", "late copies"])
def recorded(request, monkeypatch) -> RecordingBus:
    """Every model that streams its weights does so over this bus."""
    return _in_use(RecordingBus(late=request.param), monkeypatch)


@pytest.fixture
def late(monkeypatch) -> RecordingBus:
    """Copies as late as can be, into slots that hold NaN until then."""
    return _in_use(RecordingBus(late=True), monkeypatch)


def _in_use(bus: RecordingBus, monkeypatch) -> RecordingBus:
    monkeypatch.setattr(streaming.bus, "bus_to", lambda device, simulated: bus)
    return bus
