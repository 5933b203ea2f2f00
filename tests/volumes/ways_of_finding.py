"""What tests of volumes share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ratoon.machine.volumes import finding


@pytest.fixture(scope="module", params=["by handle", "by place"])
def finder(request: pytest.FixtureRequest) -> Iterator[str]:
    """How files are found: as root does, and as who is root in a user namespace alone."""

    def refuse(self: finding.ByHandle, file: bytes) -> int:
        raise PermissionError(1, "Operation not permitted")

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "by place":
            patch.setattr(finding.ByHandle, "open", refuse)
        yield request.param
