"""Whether this host can do what network policies take; for `doctor`.

Each function returns None, or for the person what is wrong and the way out.
"""

from __future__ import annotations

import os
import tempfile
from ipaddress import IPv4Address
from pathlib import Path

from ratoon.artifacts import run
from ratoon.errors import HostError
from ratoon.machine.network import rules, world
from ratoon.machine.network.nameserver import RESOLV_CONF, first_resolver, is_out_of_reach
from ratoon.machine.network.netns import inside, is_ours, new_namespace
from ratoon.machine.network.policy import OUTBOUND


def firewall_trouble() -> str | None:
    """Why no policy but `none` can be enforced; tried out in namespaces that go again."""
    try:
        scratch = new_namespace()
    except PermissionError:
        return "policies other than `none` take root, if only in a user namespace"
    try:
        inside(scratch, _lay_rules)
        if not is_ours():
            with tempfile.TemporaryDirectory(prefix="ratoon-doctor-") as name:
                world.make(Path(name)).close()
    except HostError as error:
        return str(error)
    finally:
        os.close(scratch)
    return None


def _lay_rules() -> None:
    run(["ip", "link", "add", "rtn0", "type", "veth", "peer", "name", rules.INSIDE])
    outside = rules.outside("rtn0", IPv4Address("192.0.2.1"), OUTBOUND)
    run(["nft", "-f", "-"], stdin=(outside + rules.inside()).encode())


def resolver_trouble() -> str | None:
    """Why no name would be resolved in sandboxes, whose questions QEMU passes on to the host's."""
    try:
        resolver = first_resolver(RESOLV_CONF.read_text())
    except OSError as error:
        return f"{RESOLV_CONF} cannot be read ({error.strerror}): sandboxes resolve no names"
    if resolver is None:
        return f"{RESOLV_CONF} names no IPv4 nameserver: sandboxes resolve no names"
    if not is_out_of_reach(resolver) or not is_ours():  # in another world it has a stand-in
        return None
    return (
        f"the nameserver {resolver} of {RESOLV_CONF} is out of reach under any network policy, as "
        "the host itself and link-local addresses are: sandboxes resolve no names; put another "
        "one first (of systemd-resolved: link to /run/systemd/resolve/resolv.conf)"
    )
