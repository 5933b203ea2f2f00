"""Finding the virtio-serial ports that the machine has."""

from __future__ import annotations

import os
import time


def find_port(name: str) -> str:
    """The device of the port of that name; the driver may still be probing."""
    while True:
        for entry in os.listdir("/sys/class/virtio-ports"):
            with open(f"/sys/class/virtio-ports/{entry}/name") as file:
                if file.read().strip() == name:
                    return f"/dev/{entry}"
        time.sleep(0.01)
