"""Where in a guest volumes may be."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ratoon.engine.sandbox.options import Volume


@pytest.mark.parametrize("target", ["/", "/dev", "/proc", "/proc/sys/kernel", "/sys", "/sys/fs"])
def test_what_the_guest_works_by_stays(target: str) -> None:
    with pytest.raises(ValidationError, match=f"cannot be at {target}: the guest works by"):
        Volume(source="data", target=target)


@pytest.mark.parametrize("target", ["/mnt", "/dev/shm/data", "/process", "/system", "/devices"])
def test_all_else_is_free(target: str) -> None:
    assert Volume(source="data", target=target).target == target
