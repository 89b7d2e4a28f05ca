"""``laxity record``: the requests that come to a cluster, into a file that ``laxity load --replay`` sends again."""

from __future__ import annotations

import heapq
import signal
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.live import Live
from rich.text import Text

from cli.options import (
    check_duration,
    check_size,
    cluster_option,
    explain_errors,
    find_store,
    json_option,
    key_options,
    near,
    not_running,
    print_json,
    shard_option,
    store_option,
)
from cli.recording import Recorded, RecordingError, Writer
from cli.shard_access import find_access
from cli.snapshot import look
from cli.taps import Lost, Seen, TapClient, TapError
from laxity.channel import parse_url

HELD: Final = 1.0
"""Seconds for which a request is held back, so that those of all shards are written in the order in which they came."""
HELD_BYTES: Final = 64 * 1024 * 1024
"""Bytes of payloads that are held back at most."""
PATIENCE: Final = 5.0
"""Seconds to wait for the first shard."""
LEAST_BYTES: Final = 4096


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--pipeline", "pipelines", multiple=True, metavar="NAME", help="Only its requests. May be repeated.")
@click.option("--duration", callback=check_duration, metavar="TIME", help="As in 60s (default: until Ctrl-C).")
@click.option(
    "--payloads/--no-payloads",
    default=True,
    show_default=True,
    help="Whether to record what is in the payloads, or only their structure and sizes.",
)
@click.option(
    "--max-bytes",
    callback=check_size,
    default="1GiB",
    show_default=True,
    metavar="SIZE",
    help="End when the file is that large.",
)
@shard_option
@key_options()
@cluster_option
@store_option
@json_option
@explain_errors
def record(
    file: Path,
    pipelines: tuple[str, ...],
    duration: float | None,
    payloads: bool,
    max_bytes: int,
    shard: str | None,
    key: str,
    plain: bool,
    cluster: str,
    store: str | None,
    as_json: bool,
) -> None:
    """Record the requests that come to a running cluster, until Ctrl-C, --duration or --max-bytes.

    All shards that are there now tell what comes to them: when, for which pipeline, with which budget and priority, and
    the payload, which may be private: see --no-payloads. Serving is not held up: where the recorder is too slow,
    requests are left out of the recording, and counted. `laxity load --replay FILE` sends it again; docs/recording.md
    has the file's format.

    Exit status: 0 good, however it was ended, 1 if no shard could be tapped or the file not be written, 2 wrong use.

    \b
    Examples:
      laxity record traffic.rec --duration 60s
      laxity record ocr.rec --pipeline ocr --no-payloads --max-bytes 100MiB
      laxity load --replay traffic.rec --speed 2
    """
    if max_bytes < LEAST_BYTES:
        raise click.UsageError(f"--max-bytes {max_bytes} is too little for a recording; give {LEAST_BYTES} or more")
    shards = _named(shard) if shard is not None else _known(cluster, store, pipelines)
    credentials = find_access(key, plain, cluster, store, shard).credentials()
    about = {
        "began": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "cluster": cluster if shard is None else "",
        "shards": sorted(shards),
        "pipelines": list(pipelines),
        "payloads": payloads,
    }
    try:
        with Writer(file, about, max_bytes) as writer, TapClient(shards, pipelines, payloads, credentials) as taps:
            recorder = _Recorder(writer, taps, duration)
            try:
                recorder.run()
            except TapError:
                if not writer.requests:
                    file.unlink()
                raise
    except (RecordingError, TapError) as error:
        raise click.ClickException(str(error)) from error
    found = {
        "file": str(file),
        "seconds": recorder.seconds,
        "requests": writer.requests,
        "pipelines": dict(recorder.counts),
        "lost": writer.lost,
        "bytes": writer.size,
        "ended_by": recorder.ended_by,
    }
    if as_json:
        print_json(found)
    else:
        of = ", ".join(f"{count:,} of {name}" for name, count in recorder.counts.most_common())
        click.echo(
            f"{writer.requests:,} requests{f' ({of})' if of else ''} in {recorder.seconds:.1f} s: "
            f"{writer.size:,} bytes in {file}, ended by {recorder.ended_by}"
        )
    if writer.lost:
        click.echo(
            f"{writer.lost:,} requests came and are not in it: this machine or its disk was too slow for them; record "
            "fewer pipelines, or with --no-payloads",
            err=True,
        )


def _named(addresses: str) -> dict[str, str]:
    try:
        return {address: address for address in parse_url(addresses)}
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _known(cluster: str, store: str | None, pipelines: tuple[str, ...]) -> dict[str, str]:
    seen = look(find_store(cluster, store), cluster)
    if not seen.brokers:
        raise not_running(cluster, store)
    for pipeline in pipelines:
        if pipeline not in seen.pipelines:
            hint = near(pipeline, seen.pipelines, "it has")
            raise click.ClickException(f"the cluster {cluster!r} has no pipeline {pipeline!r}; {hint}")
    return {name: record.frontend for name, record in seen.brokers.items()}


class _Recorder:
    """Moves what the taps tell into the file, in order."""

    def __init__(self, writer: Writer, taps: TapClient, duration: float | None) -> None:
        self._writer = writer
        self._taps = taps
        self._duration = duration
        self._held: list[tuple[float, int, Recorded]] = []
        self._held_bytes = 0
        self._number = 0
        self._written = 0.0
        self._full = False
        self._interrupted = False
        self._silent: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self.ended_by = ""

    def run(self) -> None:
        before = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        console = Console(stderr=True)
        live = Live(console=console, transient=True, refresh_per_second=2) if console.is_terminal else None
        try:
            if live is not None:
                live.start()
            first = self._wait_for_shards()
            start = time.monotonic()
            click.echo("recording; Ctrl-C ends it", err=True)
            self._hold(first, start)
            self._record(start, live)
        finally:
            if live is not None:
                live.stop()
            _restore(before)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self._interrupted = True

    def _wait_for_shards(self) -> list[Seen | Lost]:
        """What was told until the first of them answered."""
        found: list[Seen | Lost] = []
        ends = time.monotonic() + PATIENCE
        while not self._taps.heard() and not self._interrupted:
            if time.monotonic() > ends:
                why = "".join(f"; {trouble}" for trouble in self._taps.troubles())
                raise TapError(f"no shard has answered within {PATIENCE:g} s{why}; see `laxity status`")
            found += self._taps.poll(0.1)
        return found

    def _record(self, start: float, live: Live | None) -> None:
        shown = flushed = start
        while not self.ended_by:
            now = time.monotonic()
            left = 3600.0 if self._duration is None else start + self._duration - now
            if self._interrupted:
                self.ended_by = "Ctrl-C"
            elif left <= 0:
                self.ended_by = "--duration"
            else:
                self._hold(self._taps.poll(min(left, 0.1)), start)
                self._write(time.monotonic() - start - HELD)
            if self._full:
                self.ended_by = "--max-bytes"
            if now - flushed >= 1.0:
                flushed = now
                self._writer.flush()
                self._tell_silent()
            if live is not None and now - shown >= 0.5:
                shown = now
                live.update(self._line(now - start))
        self.seconds = time.monotonic() - start
        if self._duration is not None:
            self.seconds = min(self.seconds, self._duration)
            # What came before the end may be told a little later.
            self._hold(self._taps.poll(0.1), start)
        self._write(self.seconds)
        self._writer.end(self.seconds)

    def _hold(self, found: list[Seen | Lost], start: float) -> None:
        for one in found:
            if isinstance(one, Lost):
                self._writer.add_lost(max(time.monotonic() - start, 0.0), one.shard, one.requests)
            else:
                self._number += 1
                heapq.heappush(self._held, (one.at - start, self._number, one.request))
                self._held_bytes += _size(one.request)

    def _write(self, until: float) -> None:
        """Write what came before ``until``, and more where too much is held back."""
        while self._held and not self._full and (self._held[0][0] < until or self._held_bytes > HELD_BYTES):
            offset, _, request = heapq.heappop(self._held)
            self._held_bytes -= _size(request)
            self._written = max(self._written, offset)
            if self._writer.add(msgspec.structs.replace(request, offset=self._written)):
                self.counts[request.pipeline] += 1
            else:
                self._full = True

    def _tell_silent(self) -> None:
        silent = set(self._taps.silent())
        for shard in sorted(silent - self._silent):
            click.echo(f"shard {shard} is silent: what comes to it is not recorded until it is back", err=True)
        self._silent = silent

    def _line(self, seconds: float) -> Text:
        writer = self._writer
        told = f"{seconds:,.0f} s: {writer.requests + len(self._held):,} requests, {writer.size:,} bytes"
        return Text(f"{told}, {writer.lost:,} lost" if writer.lost else told)


def _size(request: Recorded) -> int:
    return sum(map(len, request.parts)) if request.parts else 0


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
