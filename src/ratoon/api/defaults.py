"""What an image is booted with where nobody says otherwise."""

from __future__ import annotations

RAM_MIB = 512
DISK_MIB = 8192
#: What `stop` gives a command to end.
STOP_SECONDS = 10.0
