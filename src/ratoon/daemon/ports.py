"""The routes of published ports: of the host, into a guest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from fastapi import APIRouter

from ratoon.api.answers import LOOPBACK, PublishedPort
from ratoon.daemon.context import TheDaemon
from ratoon.daemon.models.sandboxes import PublishRequest
from ratoon.daemon.problems import error_responses
from ratoon.engine.sandbox.engine import Engine
from ratoon.errors import Conflict, NotFound
from ratoon.machine.network.ports import HeldPort

router = APIRouter(tags=["ports"])


@router.get("/v1/sandboxes/{sandbox_id}/ports", responses=error_responses(404))
async def list_ports(sandbox_id: str, daemon: TheDaemon) -> list[PublishedPort]:
    """The ports of the host that lead into a sandbox."""
    return [*daemon.engine.get(sandbox_id).ports]


@router.post(
    "/v1/sandboxes/{sandbox_id}/ports", status_code=201, responses=error_responses(400, 404, 409)
)
async def publish(sandbox_id: str, body: PublishRequest, daemon: TheDaemon) -> PublishedPort:
    """Have a port of the host lead to one in the guest, on its loopback."""
    sandbox = daemon.engine.get(sandbox_id)
    with held_ports(daemon.engine, [body]) as (held,):
        return sandbox.publish(held)


@router.delete(
    "/v1/sandboxes/{sandbox_id}/ports/{guest_port}", status_code=204, responses=error_responses(404)
)
async def unpublish(sandbox_id: str, guest_port: int, daemon: TheDaemon) -> None:
    """Close the ports that lead to one in the guest, and their connections."""
    sandbox = daemon.engine.get(sandbox_id)
    leading = [each for each in sandbox.ports if each.guest_port == guest_port]
    if not leading:
        raise NotFound(f"port {guest_port} of sandbox {sandbox_id} is not published")
    for each in leading:
        await sandbox.unpublish(each)


@contextmanager
def held_ports(engine: Engine, wanted: Sequence[PublishRequest]) -> Iterator[list[HeldPort]]:
    """Hold these for a sandbox that is to be made. Conflict: one is taken, maybe by a sandbox."""
    with ExitStack() as holding:
        yield [holding.enter_context(_held(engine, each)) for each in wanted]


def _held(engine: Engine, wanted: PublishRequest) -> HeldPort:
    try:
        return HeldPort(wanted.guest_port, wanted.host_port or 0, wanted.address or LOOPBACK)
    except Conflict:
        for sandbox in engine.sandboxes:
            for port in sandbox.ports:
                if port.host_port == wanted.host_port:
                    raise Conflict(
                        f"port {port.host_port} of {port.address} leads to sandbox {sandbox.id}; "
                        f"choose another, or end it with `ratoon kill {sandbox.id}`"
                    ) from None
        raise
