"""Who may ask what over HTTP and gRPC, and how long and how much: real servers, at a loopback address and at all."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="pip install 'laxity[gateway]'")

import grpc
from click.testing import CliRunner
from conftest import WAIT
from gateway_process import GatewayProcess
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from cli.dashboard.app import dashboard_app
from cli.main import main
from cluster.observe.exporter import exporter_app
from cluster.observe.sidecar import Beginning
from cluster.store import sqlite_url
from laxity.bounded_http import HttpServer, Limits
from laxity.gateway.catalog import Catalog
from laxity.gateway.grpc_messages import SERVICE, message
from laxity.gateway.server import Bound, GatewayConfig, run_gateway
from laxity.http_access import OPEN, HttpAccess
from laxity.http_tokens import HttpTokens, InvalidTokens, read_tokens

LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
MINE, OTHER = "a-token-of-somebody", "b.token_of~others/+=="


def write(file: Path, text: str) -> Path:
    """In place of what was there, as what deploys files does it."""
    new = file.with_suffix(".new")
    new.touch(0o600)
    new.write_text(text)
    new.rename(file)
    return file


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write(tmp_path / "tokens", f"# who may ask\n\nprometheus {MINE}\n{OTHER}\n")


# ---- the file ------------------------------------------------------------------------------------


def test_a_file_names_tokens(tokens: Path) -> None:
    assert read_tokens(tokens) == [MINE, OTHER]
    known = HttpTokens(tokens)
    assert known.shown(MINE)
    assert known.shown(OTHER)
    assert not any(known.shown(text) for text in ("", "prometheus", MINE[:-1], f"{MINE}x", "ü", "\udcff"))
    assert MINE not in repr(known.current())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "there is no token in"),
        ("# nothing\n", "there is no token in"),
        ("name short-secret\n", "line 1: a token has 16 characters or more"),
        (f"{MINE}\nsecret\u00e9secretsecretsecret", "line 2: a token has 16 characters or more, letters, digits"),
        (f"one two {MINE}secret", "line 1: write a token, or a name and a token"),
        ("x" * 70_000, "has more than 65536 bytes"),
    ],
)
def test_a_file_that_is_none_of_tokens(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(InvalidTokens, match=why) as refused:
        read_tokens(write(tmp_path / "tokens", text))
    assert "secret" not in str(refused.value)


def test_files_that_others_read_and_what_is_no_file(tokens: Path) -> None:
    for mode in (0o640, 0o604, 0o620):
        tokens.chmod(mode)
        with pytest.raises(InvalidTokens, match=f"can be read by others .mode {mode:04o}.*chmod 600"):
            read_tokens(tokens)
    with pytest.raises(InvalidTokens, match="is no file"):
        read_tokens("/dev/null")
    with pytest.raises(InvalidTokens, match="cannot be read: No such file"):
        read_tokens("/nowhere")


def test_it_is_read_again_when_it_changes_and_nobody_is_let_in_while_it_is_bad(
    tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = HttpTokens(tokens)
    assert known.shown(MINE)
    write(tokens, f"{OTHER}\n")
    assert (known.shown(MINE), known.shown(OTHER)) == (False, True)
    tokens.chmod(0o644)
    assert [known.shown(OTHER) for _ in range(3)] == [False] * 3
    assert caplog.text.count("nobody is let in by a token") == 1
    tokens.chmod(0o600)
    assert known.shown(OTHER)
    tokens.unlink()
    assert not known.shown(OTHER)
    write(tokens, MINE)
    assert known.shown(MINE)
    assert MINE not in caplog.text
    assert OTHER not in caplog.text


def test_services_do_not_start_with_a_bad_file(tokens: Path) -> None:
    tokens.chmod(0o644)
    for service in (("broker", "--shard", "s"), ("node", "--agent", "a"), ("coordinator", "--name", "c"), ("gateway",)):
        command = [service[0], "run", *service[1:], "--store", "sqlite:////nowhere/s", "--http-token-file", str(tokens)]
        refused = CliRunner().invoke(main, command)
        assert (refused.exit_code, "can be read by others" in refused.stderr) == (2, True), service
        command = [*command[:-2], "--http-open", "metrics,inference"]
        refused = CliRunner().invoke(main, command)
        assert (refused.exit_code, "'inference' is nothing that can be open" in refused.stderr) == (2, True), service


# ---- shards, agents, coordinators ------------------------------------------------------------------


class Served:
    """An application in a thread."""

    def __init__(self, host: str, make: Callable[[str], Any], limits: Limits | None = None) -> None:
        listener = socket.create_server((host, 0))
        self.port = listener.getsockname()[1]
        self._server = HttpServer(make(listener.getsockname()[0]), limits)
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, Any, str]:
        return ask(f"{LOOPBACK}:{self.port}", path, method, body, **headers)


def ask(at: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, Any, str]:
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection(at, timeout=WAIT)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture
def observed(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Serves what `laxity observe` does beside a coordinator."""
    with ExitStack() as stack:

        def serve(host: str, tokens: Path | None = None, opened: tuple[str, ...] = OPEN) -> Served:
            def app(bound: str) -> Any:
                access = HttpAccess(bound, None if tokens is None else HttpTokens(tokens), opened)
                home = dashboard_app(sqlite_url(tmp_path / "store.db"), "local", access)
                return exporter_app(Beginning("coordinator", "c", ""), access, home)

            return stack.enter_context(Served(host, app))

        yield serve


@pytest.mark.parametrize(
    ("host", "protected", "opened", "shown", "expected"),
    [
        # What /metrics, /v2/health/live, /traces, the dashboard's page and what it shows answer.
        (LOOPBACK, False, OPEN, "", (200, 200, 200, 200, 200)),
        (LOOPBACK, False, (), "", (200, 200, 200, 200, 200)),
        (LOOPBACK, False, OPEN, "anything at all", (200, 200, 200, 200, 200)),
        (EVERYWHERE, False, OPEN, "", (200, 200, 403, 403, 403)),
        (EVERYWHERE, False, OPEN, MINE, (200, 200, 403, 403, 403)),
        (EVERYWHERE, False, (), "", (403, 403, 403, 403, 403)),
        (EVERYWHERE, False, ("traces",), "", (403, 403, 200, 403, 403)),
        (EVERYWHERE, False, ("dashboard",), "", (403, 403, 403, 200, 200)),
        (EVERYWHERE, True, OPEN, "", (200, 200, 401, 200, 401)),
        (EVERYWHERE, True, (), "", (401, 401, 401, 200, 401)),
        (EVERYWHERE, True, (), f"{MINE}x", (401, 401, 401, 200, 401)),
        (EVERYWHERE, True, (), MINE, (200, 200, 200, 200, 200)),
        (EVERYWHERE, True, OPEN, OTHER, (200, 200, 200, 200, 200)),
        (LOOPBACK, True, OPEN, "", (200, 200, 401, 200, 401)),
        (LOOPBACK, True, ("dashboard",), "", (401, 401, 401, 200, 200)),
        (LOOPBACK, True, OPEN, MINE, (200, 200, 200, 200, 200)),
    ],
)
def test_who_may_ask_what(
    observed: Any, tokens: Path, host: str, protected: bool, opened: tuple[str, ...], shown: str, expected: Any
) -> None:
    served = observed(host, tokens if protected else None, opened)
    headers = bearer(shown) if shown else {}
    paths = ("/metrics", "/v2/health/live", "/traces", "/", "/api/view")
    answers = [served.ask(path, **headers) for path in paths]
    assert tuple(status for status, _, _ in answers) == expected
    for status, told, text in answers:
        if status == 401:
            assert told["www-authenticate"].startswith('Bearer realm="laxity"')
            assert ('error="invalid_token"' in told["www-authenticate"]) == bool(shown)
        elif status == 403:
            assert "start this service with --http-token-file FILE, or" in json.loads(text)["error"]


def test_odd_ways_to_show_a_token(observed: Any, tokens: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = observed(LOOPBACK, tokens)
    assert served.ask("/traces", authorization=f"bearer  {MINE}")[0] == 200
    for wrong in (MINE, f"Basic {MINE}", f"Bearer{MINE}", "Bearer", "Bearer ", f"Bearer {MINE} {OTHER}", "Bearer \xff"):
        assert served.ask("/traces", authorization=wrong)[0] == 401, wrong
    for path in ("/traces/x", "/traces?limit=1", "/api/events", "//traces", "/x/../traces"):
        assert served.ask(path)[0] in (401, 404), path
    assert served.ask(f"/traces?token={MINE}")[0] == 401
    assert caplog.text.count("shows a token that is not known") == 3  # of 7: the 1st, the 2nd and the 4th
    assert "127.0.0.1 shows" in caplog.text
    assert MINE not in caplog.text


def test_a_token_that_is_taken_away_lets_nobody_in(observed: Any, tokens: Path) -> None:
    served = observed(EVERYWHERE, tokens)
    connection = http.client.HTTPConnection(LOOPBACK, served.port, timeout=WAIT)
    connection.request("GET", "/api/events", headers=bearer(MINE))
    stream = connection.getresponse()
    assert stream.readline() == b"retry: 1000\n"
    assert served.ask("/traces", **bearer(MINE))[0] == 200
    write(tokens, OTHER)
    assert served.ask("/traces", **bearer(MINE))[0] == 401
    assert served.ask("/traces", **bearer(OTHER))[0] == 200
    while stream.readline():  # what was begun with it ends
        pass
    connection.close()


def test_signing_in_with_one_of_the_tokens(observed: Any, tokens: Path) -> None:
    served = observed(EVERYWHERE, tokens)
    own = {"x_laxity_request": "1"}

    def sign_in(token: str) -> tuple[int, str]:
        status, headers, _ = served.ask("/api/sign-in", "POST", json.dumps({"token": token}).encode(), **own)
        return status, headers.get("set-cookie", "")

    assert json.loads(served.ask("/api/session")[2]) == {"possible": True, "needed": True, "signed_in": False}
    assert sign_in("not one of the tokens") == (403, "")
    status, cookie = sign_in(OTHER)
    assert status == 200
    assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "Path=/"))
    assert OTHER not in cookie
    cookie = cookie.partition(";")[0]
    assert served.ask("/api/view", cookie=cookie)[0] == 200
    assert served.ask("/traces", cookie=cookie)[0] == 401  # it is the dashboard's alone
    resume = "/api/nodes/nobody/resume"
    assert served.ask(resume, "POST", cookie=cookie)[0] == 403
    assert served.ask(resume, "POST", **own)[0] == 401
    assert served.ask(resume, "POST", cookie=cookie, **own)[0] == 409
    assert served.ask(resume, "POST", **bearer(MINE))[0] == 409
    forged = f"laxity-local=99999999999.{'0' * 64}"
    assert served.ask("/api/view", cookie=forged)[0] == 401
    write(tokens, MINE)
    assert served.ask("/api/view", cookie=cookie)[0] == 401


def test_without_tokens_nobody_changes_anything(observed: Any) -> None:
    for host in (LOOPBACK, EVERYWHERE):
        served = observed(host, None, ("dashboard",))
        assert json.loads(served.ask("/api/session")[2]) == {"possible": False, "needed": False, "signed_in": False}
        for headers in ({}, bearer(MINE)):
            assert served.ask("/api/nodes/a/drain", "POST", x_laxity_request="1", **headers)[0] == 401
        assert served.ask("/api/sign-in", "POST", b'{"token": ""}', x_laxity_request="1")[0] == 403


def test_names_that_lead_here_are_not_this_hosts(observed: Any, tokens: Path) -> None:
    alone, protected, everywhere = observed(LOOPBACK), observed(LOOPBACK, tokens), observed(EVERYWHERE, tokens)
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "["):
        for path in ("/metrics", "/traces", "/", "/api/view"):
            assert alone.ask(path, host=host)[0] == 421, (path, host)
        assert protected.ask("/metrics", host=host)[0] == 421
        assert protected.ask("/traces", host=host, **bearer(MINE))[0] == 200  # no page from elsewhere knows it
        assert everywhere.ask("/metrics", host=host)[0] == 200
        assert everywhere.ask("/traces", host=host)[0] == 401
    for host in ("localhost", "LOCALHOST:8000", "laxity.localhost", "127.0.0.1", "[::1]:80", "10.1.2.3"):
        assert alone.ask("/traces", host=host)[0] == 200, host


def test_what_is_refused_is_told_at_the_start(tokens: Path, caplog: pytest.LogCaptureFixture) -> None:
    HttpAccess(EVERYWHERE, HttpTokens(tokens)).warn("traces", "0.0.0.0:1")
    HttpAccess(LOOPBACK, None).warn("traces", "127.0.0.1:1")
    HttpAccess("::1", None).warn("traces", "[::1]:1")
    HttpAccess(EVERYWHERE, None, ["traces"]).warn("traces", "0.0.0.0:1")
    assert caplog.text == ""
    HttpAccess("::", None).warn("traces", "[::]:7")
    assert "other hosts reach [::]:7: traces is refused to everybody there" in caplog.text
    assert "give --http-token-file FILE, or name traces in --http-open" in caplog.text
    caplog.clear()
    HttpAccess("10.0.0.1", None).warn("inference", "10.0.0.1:8000")
    assert "--http-open" not in caplog.text


# ---- the gateway -----------------------------------------------------------------------------------


@contextmanager
def gateway(**config: Any) -> Iterator[Bound]:
    """A gateway in a thread, of a cluster without anything."""
    stop = threading.Event()
    bound: Future[Bound] = Future()

    def run() -> None:
        try:
            run_gateway(GatewayConfig(**config), Catalog, stop, stop, bound.set_result)
        except BaseException as error:
            bound.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        at = bound.result(WAIT)
        yield Bound(at.http.replace(EVERYWHERE, LOOPBACK), at.grpc.replace(EVERYWHERE, LOOPBACK))
    finally:
        stop.set()
        thread.join()


def call(at: str, method: str, raw: bytes = b"", token: str = "", **options: Any) -> tuple[str, str]:
    """The code and the details of an RPC."""
    metadata = (("authorization", f"Bearer {token}"), *options.pop("metadata", ())) if token else ()
    with grpc.insecure_channel(at, options=[("grpc.max_send_message_length", -1)]) as channel:
        try:
            channel.unary_unary(f"/{SERVICE}/{method}")(raw, metadata=metadata, timeout=WAIT, **options)
        except grpc.RpcError as error:
            return error.code().name, error.details() or ""
    return "OK", ""


def served_by_gateway(at: Bound, token: str = "") -> tuple[tuple[int, ...], tuple[str, ...]]:
    """What metrics, health, metadata and inference answer over HTTP, and the latter three over gRPC."""
    headers = bearer(token) if token else {}
    infer = json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "INT8", "data": [1]}]}).encode()
    http_codes = [ask(at.http, path, **headers)[0] for path in ("/metrics", "/v2/health/live", "/v2/models/m")]
    http_codes.append(ask(at.http, "/v2/models/m/infer", "POST", infer, **headers)[0])
    request = message("ModelInferRequest")(model_name="m").SerializeToString()
    named = message("ModelMetadataRequest")(name="m").SerializeToString()
    methods = (("ServerLive", b""), ("ModelMetadata", named), ("ModelInfer", request))
    return tuple(http_codes), tuple(call(at.grpc, method, raw, token)[0] for method, raw in methods)


def test_who_may_ask_a_gateway(tokens: Path) -> None:
    """503 is what a gateway without shards says to those who are let in."""
    let_in = ((200, 200, 503, 503), ("OK", "UNAVAILABLE", "UNAVAILABLE"))
    with gateway(http=f"{LOOPBACK}:*", grpc=f"{LOOPBACK}:*", http_open=()) as at:
        assert served_by_gateway(at) == let_in
    with gateway(http=f"{EVERYWHERE}:*", grpc=f"{EVERYWHERE}:*") as at:
        expected = ((200, 200, 503, 403), ("OK", "UNAVAILABLE", "PERMISSION_DENIED"))
        assert served_by_gateway(at) == expected
        assert served_by_gateway(at, MINE) == expected
        assert "--http-token-file" in call(at.grpc, "ModelInfer")[1]
    given = {"http_token_file": str(tokens), "http_open": ("metrics",)}
    with gateway(http=f"{EVERYWHERE}:*", grpc=f"{EVERYWHERE}:*", **given) as at:
        expected = ((200, 401, 401, 401), ("UNAUTHENTICATED",) * 3)
        assert served_by_gateway(at) == expected
        assert served_by_gateway(at, f"{MINE}x") == expected
        assert served_by_gateway(at, MINE) == let_in
        assert "Authorization: Bearer" in call(at.grpc, "ModelInfer")[1]
        with grpc.insecure_channel(at.grpc) as channel:
            stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
            with pytest.raises(grpc.RpcError) as refused:
                next(stream(iter(()), timeout=WAIT))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            request = message("ModelInferRequest")(model_name="m").SerializeToString()
            (answer,) = stream(iter([request]), metadata=(("authorization", f"Bearer {MINE}"),), timeout=WAIT)
            assert b"nothing is known of 'm'" in answer
        write(tokens, OTHER)
        assert served_by_gateway(at, MINE) == expected


def test_pages_from_elsewhere_do_not_use_a_gateway() -> None:
    with gateway(http=f"{LOOPBACK}:*", grpc="") as at:
        infer = "/v2/models/m/infer"
        assert ask(at.http, "/v2", host="evil.example")[0] == 421
        assert ask(at.http, infer, "POST", b"{}", host="evil.example")[0] == 421
        assert ask(at.http, infer, "POST", b"{}", sec_fetch_site="cross-site")[0] == 403
        assert ask(at.http, infer, "POST", b"{}", sec_fetch_site="same-origin")[0] == 503


def test_a_gateway_bounds_what_it_takes_over_grpc() -> None:
    endless = threading.Event()

    def never() -> Iterator[bytes]:
        endless.wait(WAIT)
        yield from ()

    with gateway(http="", grpc=f"{LOOPBACK}:*", body_timeout=0.05) as at:
        with grpc.insecure_channel(at.grpc) as channel:
            waiting = channel.stream_unary(f"/{SERVICE}/ModelInfer").future(never(), timeout=WAIT)
            error = waiting.exception()
            endless.set()
        assert isinstance(error, grpc.RpcError)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the message was not there within 0.05 s" in error.details()
        big = (("padding", "x" * 20_000),)
        assert call(at.grpc, "ServerLive", token="t", metadata=big)[0] == "RESOURCE_EXHAUSTED"
        long = message("ModelInferRequest")(model_name="m" * 5000).SerializeToString()
        code, details = call(at.grpc, "ModelInfer", long)
        assert (code, "has 5000 characters; names and ids have 1024 at most" in details) == ("INVALID_ARGUMENT", True)
        unknown = message("ModelMetadataRequest")(name="m" * 100_000).SerializeToString()
        assert call(at.grpc, "ModelMetadata", unknown)[0] == "UNAVAILABLE"  # and says no more than fits


def test_a_small_message_does_not_become_a_large_one(tmp_path: Path) -> None:
    def peak(process: GatewayProcess) -> int:
        """KiB of memory that it had at most."""
        lines = Path(f"/proc/{process.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    nobody = ("--connect", "tcp://127.0.0.1:1", "--max-body", "1MiB")
    with GatewayProcess(tmp_path / "log", *nobody) as running:
        before = peak(running)
        bomb = bytes(100 * 1024**2)
        for algorithm in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            code, _ = call(running.grpc, "ModelInfer", bomb, compression=algorithm)
            assert code in ("RESOURCE_EXHAUSTED", "UNIMPLEMENTED")  # the latter with an older grpcio
        assert peak(running) - before < 50 * 1024


# ---- clients that take their time --------------------------------------------------------------------


async def reads(scope: Any, receive: Any, send: Any) -> None:
    """Answers once the body is there."""
    await Request(scope, receive).body()
    await PlainTextResponse("there")(scope, receive, send)


def closed(port: int, *sent: bytes) -> bytes:
    """What comes until the connection is closed, after these bytes were sent."""
    with socket.create_connection((LOOPBACK, port), WAIT) as connection:
        for part in sent:
            connection.sendall(part)
        found = b""
        try:
            while part := connection.recv(4096):
                found += part
        except ConnectionError:
            pass
        return found


def test_who_does_not_finish_a_request_is_cut_off() -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    with Served(LOOPBACK, lambda _: reads, Limits(head_within=0.02, body_within=0.02, check=0.01)) as served:
        assert closed(served.port) == b""
        assert closed(served.port, b"GET / HTTP/1.1\r\nHost:") == b""
        assert closed(served.port, head + b"xxx") == b""
        assert closed(served.port, head + b"x" * 9, b"GE").startswith(b"HTTP/1.1 200")


def test_who_sends_a_body_drop_by_drop_is_cut_off() -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
    limits = Limits(head_within=WAIT, body_within=0.02, check=0.01)

    def drip(connection: socket.socket) -> None:
        """It never rests for as long as would end it by itself."""
        connection.sendall(head)
        while True:
            connection.sendall(b"x")

    with (
        Served(LOOPBACK, lambda _: reads, limits) as served,
        socket.create_connection((LOOPBACK, served.port), WAIT) as connection,
        pytest.raises(ConnectionError),
    ):
        drip(connection)


def test_heads_are_bounded_in_one_piece_as_well() -> None:
    with Served(LOOPBACK, lambda _: reads) as served:
        lines = b"".join(b"h%d: x\r\n" % number for number in range(101))
        assert closed(served.port, b"GET / HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n").startswith(b"HTTP/1.1 431")
        large = b"GET / HTTP/1.1\r\nHost: x\r\nlarge: " + b"x" * 17_000 + b"\r\n\r\n"
        assert closed(served.port, large)[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400")
        assert served.ask("/", large="x" * 10_000)[0] == 200


def test_one_too_many_makes_room() -> None:
    with Served(LOOPBACK, lambda _: reads, Limits(connections=3)) as served, ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection((LOOPBACK, served.port), WAIT)) for _ in range(4)]
        assert held[0].recv(1) == b""
        assert served.ask("/")[0] == 200
