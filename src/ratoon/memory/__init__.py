"""Guest memory: page sets (layers), chains of them, images, and the RAM of a running process."""

from ratoon.memory.chain import Link, count_above, overlay, owners, pages_above, resolve
from ratoon.memory.digests import (
    DIGEST_SIZE,
    PAGE_SIZE,
    ZERO_DIGEST,
    hash_pages,
    memory_root,
    select_changed,
    zero_array,
)
from ratoon.memory.dirty import dirty_pages
from ratoon.memory.image import ImageStore
from ratoon.memory.pageset import PageIndex, read_index, read_pages
from ratoon.memory.process import Mapping, PageBuffer, find_mapping, read_into, write_pages
from ratoon.memory.writing import write_page_set

__all__ = [
    "DIGEST_SIZE",
    "PAGE_SIZE",
    "ZERO_DIGEST",
    "ImageStore",
    "Link",
    "Mapping",
    "PageBuffer",
    "PageIndex",
    "count_above",
    "dirty_pages",
    "find_mapping",
    "hash_pages",
    "memory_root",
    "overlay",
    "owners",
    "pages_above",
    "read_index",
    "read_into",
    "read_pages",
    "resolve",
    "select_changed",
    "write_page_set",
    "write_pages",
    "zero_array",
]
