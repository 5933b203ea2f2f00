"""What faults are injected into, one operation on a store: `python operations.py HOME NAME`.

It exits with 0 if it succeeded and with 1 if it failed with an error that users are meant to see.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from ratoon.errors import RatoonError
from ratoon.store.memory.image import ImageStore
from ratoon.store.pack.pack import pack
from ratoon.store.pack.unpack import unpack
from ratoon.store.snapshot.compact import compact
from ratoon.store.snapshot.compress import rewrite_layers
from ratoon.store.snapshot.links import read_links
from ratoon.store.snapshot.store import Store
from small_snapshots import RAM
from small_snapshots import publish as grow

MARK = "begin"
PACK = "farther.tar.zst"


def build(home: Path) -> None:
    """The store that every operation starts from: base, L1 and side on it, and a pack beside it."""
    elsewhere = Store.open(home.with_name("elsewhere"))
    far = grow(elsewhere, "far", {0: 1, 7: 7})
    grow(elsewhere, "farther", {8: 8}, far)
    pack(elsewhere, "farther", home.with_name(PACK))
    store = Store.open(home)
    base = grow(store, "base", {0: 1, 1: 2, 5: 0, 9: 3})
    grow(store, "L1", {1: 7, 2: 8}, base)
    grow(store, "side", {200: 4}, base)


def publish(store: Store) -> None:
    grow(store, "new", {3: 9, 4: 0}, store.get("L1"))


def delete(store: Store) -> None:
    store.delete("L1")


def force(store: Store) -> None:
    store.delete("base", force=True)


def cascade(store: Store) -> None:
    store.delete("base", cascade=True)


def image(store: Store) -> None:
    ImageStore(store.images).make(read_links(store.get("L1")), RAM)


def flatten(store: Store) -> None:
    compact(store, "L1", "flat")


def press(store: Store) -> None:
    rewrite_layers(store, "compressed")


def receive(store: Store) -> None:
    unpack(store, store.home.with_name(PACK))


OPERATIONS: dict[str, Callable[[Store], None]] = {
    each.__name__: each
    for each in (publish, delete, force, cascade, image, flatten, press, receive)
}


def main() -> int:
    home, name = Path(sys.argv[1]), sys.argv[2]
    store = Store.open(home)
    # Faults count from here: nothing before this line changes anything, and this file is not there.
    Path(MARK).exists()
    try:
        OPERATIONS[name](store)
    except (RatoonError, OSError) as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
