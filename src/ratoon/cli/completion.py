"""What the shell may complete: names in the store here, without asking anybody."""

from __future__ import annotations


def sandboxes(incomplete: str) -> list[str]:
    """Ids that begin so."""
    return _names("sandboxes", incomplete)


def snapshots(incomplete: str) -> list[str]:
    """Tags that begin so."""
    return _names("snapshots", incomplete)


def _names(directory: str, incomplete: str) -> list[str]:
    from ratoon import paths
    from ratoon.client.address import url_of_environment

    place = paths.home() / directory
    if url_of_environment() or not place.is_dir():
        return []
    return sorted(each.name for each in place.iterdir() if each.name.startswith(incomplete))
