"""Images as they are named on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratoon.cli.naming import located


@pytest.mark.parametrize(
    "name", ["debian", "debian:trixie+git", "python:3.12", "registry:5000/x", "dir:", "dirs:x"]
)
def test_names_of_elsewhere_stay(name: str) -> None:
    assert located(name) == name


@pytest.mark.parametrize("kind", ["dir", "tar", "oci", "oci-archive", "docker-archive"])
def test_paths_are_of_the_directory_where_they_are_typed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert located(f"{kind}:here") == f"{kind}:{tmp_path}/here"
    assert located(f"{kind}:/there:ref") == f"{kind}:/there:ref"
    assert located(f"{kind}:layout:v1") == f"{kind}:{tmp_path}/layout:v1"
