"""A page of guest memory and its digest: how large they are."""

from __future__ import annotations

#: Bytes in a page, whatever the host's or the guest's large pages are.
PAGE_SIZE = 4096
#: Bytes in a digest.
DIGEST_SIZE = 32
