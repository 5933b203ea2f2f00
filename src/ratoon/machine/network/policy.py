"""What a sandbox's guest may reach: nothing, the world, or a list of places.

As text: ``none``, ``outbound``, or ``allow:`` and rules ``ADDRESS:PORT`` with commas in between,
where ADDRESS is an IPv4 address or CIDR block and PORT a number or ``*``, for TCP and UDP alike::

    allow:198.51.100.7:443,203.0.113.0/24:*

Whatever a policy says, a guest reaches neither its host, nor other sandboxes, nor NEVER.
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Network, NetmaskValueError
from typing import Any, Literal, Self

from pydantic import model_serializer, model_validator

from ratoon.documents import Document
from ratoon.errors import InvalidInput
from ratoon.machine.network.blocks import GUESTS_OWN, NEVER

_ALLOW = "allow:"
_HOW = "use none, outbound, or allow:CIDR:PORT,… such as allow:198.51.100.7:443,203.0.113.0/24:*"


class Rule(Document, strict=False):
    """Connections and datagrams to `port` (None: any) of each address of `network`."""

    network: IPv4Network
    port: int | None

    def __str__(self) -> str:
        whole = self.network.prefixlen == 32
        place = self.network.network_address if whole else self.network
        return f"{place}:{'*' if self.port is None else self.port}"


class NetworkPolicy(Document, strict=False):
    """One policy; equal ones are the same to everybody. It is read from its text and written as it.

    `rules` are sorted, without repetitions, and empty unless `kind` is `allow`.
    """

    kind: Literal["none", "outbound", "allow"]
    rules: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """The policy that `text` says; InvalidInput names the rule that is wrong."""
        try:
            return cls(**_fields(text))
        except ValueError as error:
            raise InvalidInput(f"network policy {text[:200]!r}: {error}") from None

    def __str__(self) -> str:
        if self.kind != "allow":
            return self.kind
        return _ALLOW + ",".join(str(rule) for rule in self.rules)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return _fields(data) if isinstance(data, str) else data

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.kind == "allow") != bool(self.rules):
            raise ValueError(_HOW)
        return self

    @model_serializer
    def _as_text(self) -> str:
        return str(self)


NONE = NetworkPolicy(kind="none")
OUTBOUND = NetworkPolicy(kind="outbound")


def _fields(text: str) -> dict[str, Any]:
    if text in ("none", "outbound"):
        return {"kind": text}
    if not text.startswith(_ALLOW):
        raise ValueError(_HOW)
    rules = {_rule(word) for word in text.removeprefix(_ALLOW).split(",")}
    order = sorted(rules, key=lambda rule: (rule.network, rule.port or 0))
    return {"kind": "allow", "rules": tuple(order)}


def _rule(text: str) -> Rule:
    place, separator, port = text.strip().rpartition(":")
    if not separator:
        raise ValueError(f"rule {text!r} has no port; write {text or 'CIDR'}:443, or :* for any")
    if ":" in place:
        raise ValueError(f"rule {text!r}: guests have no IPv6; name an IPv4 address")
    try:
        network = IPv4Network(place)
    except (AddressValueError, NetmaskValueError):
        raise ValueError(
            f"rule {text!r}: {place!r} is neither an IPv4 address nor a CIDR block"
        ) from None
    except ValueError:
        block = IPv4Network(place, strict=False)
        raise ValueError(
            f"rule {text!r}: {place} is an address within a block; write {block}"
        ) from None
    for block, what in {**NEVER, GUESTS_OWN: "the guest's own network"}.items():
        if network.subnet_of(block):
            raise ValueError(f"rule {text!r}: {block} ({what}) is not reached under any policy")
    return Rule(network=network, port=_port(text, port))


def _port(rule: str, text: str) -> int | None:
    if text == "*":
        return None
    if not (re.fullmatch(r"[0-9]{1,5}", text) and 1 <= int(text) <= 65535):
        raise ValueError(f"rule {rule!r}: {text!r} is not a port; use 1 to 65535, or * for any")
    return int(text)
