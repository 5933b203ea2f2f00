"""zstd, from wherever this Python has it, and frames that need not be trusted."""

from __future__ import annotations

import sys

from ratoon.errors import Corrupt

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

#: What zstd itself calls its default; higher levels take longer and gain a few percent.
LEVEL = 3
#: No level here uses a larger window, so no frame needs one, whatever it says of itself.
WINDOW_LOG = 23


def decompressed(raw: bytes | bytearray, at_most: int, what: str) -> bytes:
    """The content of one whole frame; holds no more than `at_most` bytes of it.

    Corrupt, naming `what` it is: damaged, longer than that, or more than one frame.
    """
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
    decompressor = zstd.ZstdDecompressor(options=options)
    try:
        data = decompressor.decompress(raw, max_length=at_most)
        if not decompressor.eof and not decompressor.needs_input:
            decompressor.decompress(b"", max_length=1)  # the end of the frame itself
    except (zstd.ZstdError, EOFError) as error:
        raise Corrupt(f"{what} cannot be decompressed; it was damaged") from error
    if not decompressor.eof or decompressor.unused_data:
        raise Corrupt(f"{what} cannot be decompressed: it does not end where it should")
    return data
