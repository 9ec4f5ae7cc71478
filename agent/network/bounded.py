"""A listener that accepts no more connections than are to be served at the same time."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import attrs
import trio

log = logging.getLogger(__name__)

Serve = Callable[[trio.SocketStream], Awaitable[None]]


@attrs.frozen
class _Bounded(trio.abc.Listener[trio.SocketStream]):
    listener: trio.SocketListener
    slots: trio.Semaphore

    async def accept(self) -> trio.SocketStream:
        await self.slots.acquire()
        try:
            return await self.listener.accept()
        except BaseException:
            self.slots.release()
            raise

    async def aclose(self) -> None:
        await self.listener.aclose()


async def serve_bounded(
    what: str, listener: trio.SocketListener, at_once: int, serve: Serve
) -> None:
    """Have ``serve`` see to every connection until cancelled; then the listener is closed.

    Each connection is closed when its ``serve`` returns, also by an exception, which is logged as
    one of ``what``. Beyond ``at_once`` connections wait in the kernel's queue. When descriptors run
    out, trio's accept loop logs it and goes on a moment later.
    """
    slots = trio.Semaphore(at_once)

    async def see_to(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await serve(stream)
        except Exception:
            log.exception("%s: a connection failed", what)
        finally:
            slots.release()

    await trio.serve_listeners(see_to, [_Bounded(listener, slots)])
