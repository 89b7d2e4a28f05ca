"""Rows of telemetry on their way to disk."""

from __future__ import annotations

import csv
import logging
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cluster.telemetry import ACTIONS, COLUMNS, REQUESTS, ActionTelemetry, RequestTelemetry, Telemetry
from cluster.telemetry_files import FILES, RotatingFiles, parse_name

WAIT = 20.0
"""Seconds after which what must come has not come."""


def requests(telemetry: RequestTelemetry, count: int, first: int = 0, detail: str = "") -> None:
    at = time.monotonic()
    for number in range(first, first + count):
        telemetry.ended(at, "client", number, "p", 100_000, 90_000, 1234, "ok", 1, "", 0, detail)


def rows(directory: Path, kind: str = REQUESTS) -> list[dict[str, str]]:
    """All rows, in the files' order."""
    found = []
    for path in sorted(directory.glob(f"{kind}-*.csv")):
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            found += list(reader)
            assert tuple(reader.fieldnames or ()) == COLUMNS[kind]
    return found


def until_written(directory: Path, count: int) -> None:
    ends = time.monotonic() + WAIT
    while len(rows(directory)) < count:
        assert time.monotonic() < ends, f"{len(rows(directory))} of {count} rows were written"
        time.sleep(0.02)


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(b"x" * 4096)


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """A real disk of 1 MB, which is full, mounted there (skips where that is not allowed)."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        fill_up(path / "filler")
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_every_row_is_written_under_the_process_name_with_a_head_and_the_time(tmp_path: Path) -> None:
    before = time.time()
    telemetry = RequestTelemetry(str(tmp_path / "made" / "here"), "shard-0")
    telemetry.start()
    requests(telemetry, 200)
    telemetry.stop()
    (path,) = (tmp_path / "made" / "here").iterdir()
    parsed = parse_name(path.name)
    assert parsed is not None
    assert parsed[:2] == ("requests", "shard-0")
    found = rows(path.parent)
    assert [int(row["id"]) for row in found] == list(range(200))
    assert before - 1 <= float(found[0]["at"]) <= time.time() + 1
    assert {name: found[7][name] for name in ("shard", "client", "latency_us", "outcome", "met", "lost")} == {
        "shard": "shard-0",
        "client": "client",
        "latency_us": "1234",
        "outcome": "ok",
        "met": "1",
        "lost": "",
    }


def test_rows_are_there_while_the_process_runs(tmp_path: Path) -> None:
    telemetry = RequestTelemetry(str(tmp_path), "s")
    telemetry.start()
    try:
        requests(telemetry, 3)
        until_written(tmp_path, 3)
    finally:
        telemetry.stop()


def test_an_action_that_never_began_has_no_start(tmp_path: Path) -> None:
    telemetry = ActionTelemetry(str(tmp_path), "agent-0")
    for start in (-1, 0, 17):
        telemetry.ended(1.0, 3, "INFER", "p@1/s", 5, 8, "shard-0", 10, 20, 0, 99, start, 21, 1, 2, "ok", 12.5, "a,b")
    telemetry.start()
    telemetry.stop()
    found = rows(tmp_path, ACTIONS)
    assert [row["start_us"] for row in found] == ["", "0", "17"]
    assert (found[0]["device"], found[0]["memory_mb"], found[0]["detail"]) == ("3", "12.5", "a,b")


def test_a_row_stays_one_line_whatever_names_and_details_hold(tmp_path: Path) -> None:
    telemetry = RequestTelemetry(str(tmp_path), "s")
    requests(telemetry, 2)
    requests(telemetry, 1, detail='Traceback:\n  line "1", and\r\nthe rest é \0 \udcff')
    telemetry.start()
    telemetry.stop()
    (path,) = tmp_path.iterdir()
    assert path.read_bytes().count(b"\n") == 1 + 3
    assert rows(tmp_path)[2]["detail"].startswith('Traceback:   line "1", and  the rest é')


def test_files_rotate_and_the_oldest_go_also_those_of_earlier_runs(tmp_path: Path) -> None:
    stranger = tmp_path / "requests-other-20260101T000000.000000Z.csv"
    stranger.write_text("kept")
    earlier = tmp_path / "requests-s-20260101T000000.000000Z.csv"
    earlier.write_text("gone")
    telemetry = RequestTelemetry(str(tmp_path), "s", limit=FILES * 10_000)
    telemetry.start()
    requests(telemetry, 3000)
    telemetry.stop()
    mine = sorted(tmp_path.glob("requests-s-*.csv"))
    assert len(mine) == FILES
    assert all(path.stat().st_size <= 10_000 for path in mine)
    assert stranger.exists()
    assert not earlier.exists()
    stranger.unlink()
    ids = [int(row["id"]) for row in rows(tmp_path)]
    assert ids == list(range(ids[0], 3000))


def test_what_does_not_fit_is_dropped_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    telemetry = RequestTelemetry(str(tmp_path), "s", queue=10)
    requests(telemetry, 25)
    assert telemetry.lost == 15
    with caplog.at_level(logging.WARNING, "laxity.telemetry"):
        telemetry.start()
        telemetry.stop()
    found = rows(tmp_path)
    assert [int(row["id"]) for row in found] == list(range(10))
    assert sum(int(row["lost"] or 0) for row in found) == 15
    assert [record.getMessage() for record in caplog.records] == ["15 rows of telemetry (requests) were lost until now"]


def test_a_full_disk_is_told_once_and_nothing_written_so_far_is_harmed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = tmp_path / "disk"
    with full_disk(disk), caplog.at_level(logging.INFO, "laxity.telemetry"):
        telemetry = RequestTelemetry(str(disk), "s", queue=5000)
        telemetry.start()
        requests(telemetry, 5000)
        ends = time.monotonic() + WAIT
        while not caplog.records and time.monotonic() < ends:
            time.sleep(0.02)
        assert "No space left on device" in caplog.records[0].getMessage()
        assert [path.name for path in disk.iterdir()] == ["filler"]
        requests(telemetry, 100, first=5000)  # 64 of the first have left the queue
        (disk / "filler").unlink()
        telemetry.stop()
        found = rows(disk)
        assert [int(row["id"]) for row in found] == list(range(5064))
        assert sum(int(row["lost"] or 0) for row in found) == 36
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]


def test_a_disk_that_fills_up_ends_with_whole_lines(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with full_disk(disk):
        (disk / "filler").unlink()
        (disk / "filler").write_bytes(b"x" * (1024 - 40) * 1024)
        files = RotatingFiles(disk, "requests", "s", b"head\n", 10**7)
        line, written = b"y" * 999 + b"\n", 0
        with suppress(OSError):
            while written < 100:
                files.write(line)
                written += 1
        assert 0 < written < 100
        (path,) = disk.glob("requests-*")
        assert path.read_bytes() == b"head\n" + line * written
        (disk / "filler").unlink()
        files.write(b"more\n")
        files.close()
        assert path.read_bytes().endswith(b"y\nmore\n")


def test_a_limit_of_the_system_on_files_is_survived_as_well(tmp_path: Path) -> None:
    files = RotatingFiles(tmp_path, "requests", "s", b"head\n", 10**7)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        files.write(b"1" * 399 + b"\n")
        with pytest.raises(OSError, match="File too large"):
            files.write(b"2" * 399 + b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    files.write(b"3\n")
    files.close()
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == b"head\n" + b"1" * 399 + b"\n3\n"


def test_a_directory_that_vanishes_is_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "telemetry"
    telemetry = RequestTelemetry(str(directory), "s")
    telemetry.start()
    try:
        requests(telemetry, 1)
        until_written(directory, 1)
        shutil.rmtree(directory)
        requests(telemetry, 2, first=1)
        until_written(directory, 2)
    finally:
        telemetry.stop()


def test_a_place_that_is_no_directory_is_told_and_does_not_keep_the_process_from_ending(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    telemetry = RequestTelemetry(str(tmp_path / "file"), "s")
    requests(telemetry, 3)
    telemetry.start()
    telemetry.stop()
    assert "telemetry cannot be written to" in caplog.text
    assert "3 rows of telemetry (requests) were lost" in caplog.text


def test_one_that_was_never_started_can_be_stopped(tmp_path: Path) -> None:
    Telemetry(REQUESTS, str(tmp_path), "s").stop()
    assert not list(tmp_path.iterdir())
