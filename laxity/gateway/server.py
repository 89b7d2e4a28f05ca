"""The gateway's process: binds, serves, and stops in order."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

import msgspec

from laxity.bounded_http import KEEP_ALIVE, MOST_HEAD, HttpServer, Limits
from laxity.gateway.catalog import Lookup
from laxity.gateway.gateway import Gateway
from laxity.gateway.http_app import HttpApp
from laxity.http_access import OPEN, HttpAccess
from laxity.http_tokens import HttpTokens

log = logging.getLogger("laxity.gateway")

ROOM: Final = 64
"""RPCs beside inference requests that may be under way, and bytes in KiB of a message beside its tensors."""

MOST_CONNECTIONS: Final = 10_000
OTHER_FILES: Final = 64
"""Files that the process may have open beside connections of clients."""
TELLING: Final = 5.0
"""Seconds that a client has to be told why it is disconnected."""
BOUNDED: Final = (1, 85)
"""The release of grpcio that takes no more memory for a compressed message than the largest message has."""
IDENTITY: Final = 1
"""gRPC's set of compression algorithms with none in it."""


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Of one gateway. ``http`` and ``grpc`` are ``host:port`` (``*``: any free one) or '' for nowhere; times are in
    seconds, sizes in bytes."""

    http: str = "127.0.0.1:8000"
    grpc: str = "127.0.0.1:8001"
    connect: str = ""
    """The shards' addresses; '' has the lookup find them."""
    max_body: int = 64 * 1024**2
    body_timeout: float = 30.0
    """How long the body of a request may take to arrive."""
    http_token_file: str = ""
    """Who shows a token of it, over HTTP or gRPC, may ask for everything ('': there are none)."""
    http_open: tuple[str, ...] = OPEN
    """What everybody may ask for."""
    max_concurrency: int = 1000
    """Inference requests under way at once; more are refused."""
    drain_timeout: float = 10.0
    key: str = ""
    """The file of the key with which shards are connected to; '' for none."""
    plain: bool = False
    """Whether shards on other hosts may be connected to without encryption."""


class Bound(msgspec.Struct, frozen=True):
    """Where a gateway serves, as ``host:port``; '' where it does not."""

    http: str
    grpc: str


class CannotServe(RuntimeError):
    """An address cannot be bound, or a package is missing."""


def run_gateway(
    config: GatewayConfig,
    lookup: Lookup | None,
    stop: threading.Event,
    at_once: threading.Event,
    ready: Callable[[Bound], None],
) -> None:
    """Serve until ``stop`` is set, then let nobody in any more and finish what is under way, unless ``at_once`` is set
    as well. ``ready`` is called once it can be connected to. :class:`CannotServe` where it cannot; ``ValueError`` for
    what is no shard's address or no key, or needs one."""
    asyncio.run(_serve(config, lookup, stop, at_once, ready))


async def _serve(
    config: GatewayConfig,
    lookup: Lookup | None,
    stop: threading.Event,
    at_once: threading.Event,
    ready: Callable[[Bound], None],
) -> None:
    gateway = Gateway(config.connect, lookup, config.max_concurrency, config.key, config.plain)
    listener = _listen(*_split(config.http)) if config.http else None
    tokens = HttpTokens(config.http_token_file) if config.http_token_file else None
    rpc: Any = None
    try:
        http_at = grpc_at = ""
        if listener is not None:
            http_at = f"{_split(config.http)[0]}:{listener.getsockname()[1]}"
        if config.grpc:
            host = _split(config.grpc)[0]
            access = HttpAccess(host, tokens, config.http_open)
            rpc, port = _grpc_server(gateway, access, config)
            grpc_at = f"{host}:{port}"
            access.warn("inference", grpc_at)
        await gateway.start()
        web = serving = None
        if listener is not None:
            access = HttpAccess(listener.getsockname()[0], tokens, config.http_open)
            access.warn("inference", http_at)
            app = HttpApp(gateway, access, config.max_body, config.body_timeout).app
            # The application itself answers who is late with a body.
            web = HttpServer(app, Limits(connections=_connections(), body_within=config.body_timeout + TELLING))
            serving = asyncio.create_task(web.serve([listener]))
        if rpc is not None:
            await rpc.start()
        ready(Bound(http_at, grpc_at))
        await _set(stop)
        log.info("stopping: %d requests are under way", gateway.in_flight)
        drained = asyncio.create_task(gateway.drain())
        hurried = asyncio.create_task(_set(at_once))
        await asyncio.wait((drained, hurried), timeout=config.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not drained.done():
            drained.cancel()
            log.warning("%d requests are still under way, and are cancelled", gateway.in_flight)
            await gateway.close()
        if web is not None and serving is not None:
            web.should_exit = True
            await serving
    finally:
        if rpc is not None:
            await rpc.stop(0.5)
        if listener is not None:
            listener.close()
        await gateway.close()


def _connections() -> int:
    """How many clients may be connected at once, over HTTP and over gRPC each: there are files left for the rest."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return min(MOST_CONNECTIONS, max(files // 2 - OTHER_FILES, 1))


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, 0 if port == "*" else int(port)


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise CannotServe(f"HTTP cannot be served at {host}:{port}: {error.strerror}; choose another --http") from error
    return listener


def _grpc_server(gateway: Gateway, access: HttpAccess, config: GatewayConfig) -> tuple[Any, int]:
    try:
        import grpc.aio

        from laxity.gateway.grpc_service import GrpcService
    except ImportError as error:
        raise CannotServe(
            f"gRPC needs the package {error.name}: pip install 'laxity[gateway]', or serve HTTP alone: --grpc ''"
        ) from error
    rpcs = config.max_concurrency + ROOM
    options = [
        ("grpc.max_receive_message_length", config.max_body + ROOM * 1024),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MOST_HEAD),
        ("grpc.absolute_max_metadata_size", MOST_HEAD),
        ("grpc.max_concurrent_streams", rpcs),
        ("grpc.max_allowed_incoming_connections", _connections()),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", KEEP_ALIVE * 1000),
        ("grpc.keepalive_time_ms", KEEP_ALIVE * 1000),
        ("grpc.so_reuseport", 0),
    ]
    if tuple(map(int, grpc.__version__.split(".")[:2])) < BOUNDED:
        options.append(("grpc.compression_enabled_algorithms_bitset", IDENTITY))
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=rpcs)
    server.add_generic_rpc_handlers((GrpcService(gateway, access, config.body_timeout).handler,))
    host, port = _split(config.grpc)
    try:
        bound = server.add_insecure_port(f"{'0.0.0.0' if host == '*' else host}:{port}")
    except RuntimeError as error:
        raise CannotServe(f"gRPC cannot be served at {host}:{port}; choose another --grpc") from error
    return server, bound


async def _set(event: threading.Event) -> None:
    """Return once it is set."""
    loop = asyncio.get_running_loop()
    seen = asyncio.Event()

    def watch() -> None:
        event.wait()
        try:
            loop.call_soon_threadsafe(seen.set)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    threading.Thread(target=watch, name="wait", daemon=True).start()
    await seen.wait()
