"""Stages: what took how long."""

from __future__ import annotations

import time

import pytest

from ratoon.engine.sandbox.stages import Stages


def test_stages_in_the_order_they_ran() -> None:
    stages = Stages()
    for name in ("resolve", "start", "load"):
        with stages(name):
            time.sleep(0.002)
    assert list(stages.ms) == ["resolve", "start", "load"]
    assert all(1.9 < ms < 500 for ms in stages.ms.values())


def test_a_stage_may_run_in_parts() -> None:
    stages = Stages()
    with stages("image"):
        time.sleep(0.002)
    with stages("start"):
        pass
    once = stages.ms["image"]
    with stages("image"):
        time.sleep(0.002)
    assert list(stages.ms) == ["image", "start"]
    assert stages.ms["image"] >= once + 1.9


def test_a_stage_that_fails_is_counted() -> None:
    stages = Stages()
    with pytest.raises(KeyError), stages("load"):
        raise KeyError
    assert "load" in stages.ms


def test_the_total_holds_what_lies_between() -> None:
    stages = Stages()
    time.sleep(0.003)
    with stages("start"):
        pass
    first = stages.total_ms
    assert first >= 2.9
    assert first > sum(stages.ms.values())
    assert stages.total_ms >= first


def test_microseconds_are_precise_enough() -> None:
    stages = Stages()
    with stages("start"):
        pass
    for value in (stages.total_ms, *stages.ms.values()):
        assert value == round(value, 3)
