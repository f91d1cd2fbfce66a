"""The log never stands in the way of what is logged."""

import logging
from pathlib import Path

import pytest

from t3d.log import log, to_file


def fail():
    with to_file(Path("/dev/full")):
        log.warning("a line")
        raise ValueError("the error")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_without_room_hides_no_error(monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as in every command
    with pytest.raises(ValueError, match="the error"):
        fail()
