from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulation.arrivals import Floats, Source, Trace, TraceError, parse_source, parse_window, prepare

SHARED = Path(os.environ.get("LAXITY_SHARED", Path(__file__).parents[2] / "shared")) / "traces"


def shared_trace(name: str) -> str:
    if not SHARED.is_dir():
        pytest.skip(f"no traces in {SHARED}; set LAXITY_SHARED to the folder that holds traces/")
    return str(SHARED / name)


def per_second(times: Floats, seconds: float) -> Floats:
    return np.bincount(times.astype(np.int64), minlength=int(seconds)).astype(np.float64)


def cv(values: Floats) -> float:
    return float(values.std() / values.mean())


def write(folder: Path, text: str) -> str:
    path = folder / "trace.csv"
    path.write_text(text)
    return str(path)


COUNTS = "seconds_offset,requests\n0,10\n1,0\n2,30\n3,20\n"


@pytest.mark.parametrize(
    ("process", "expected"), [("poisson", 1.0), ("gamma:2", 2.0), ("gamma:0.3", 0.3), ("gamma:5", 5.0)]
)
def test_processes_have_their_rate_and_variation(process: str, expected: float) -> None:
    times = prepare(process, seconds=1000).draw(300, seed=1)
    assert len(times) == pytest.approx(300_000, rel=0.01 * max(1.0, expected))
    assert cv(np.diff(times)) == pytest.approx(expected, rel=0.03)


def test_constant_gaps_are_equal() -> None:
    times = prepare("constant", seconds=10).draw(7, seed=3)
    assert len(times) == 70
    assert np.diff(times) == pytest.approx(1 / 7)


def test_the_start_of_a_renewal_process_is_no_burst() -> None:
    """A process that began with a whole gap at 0 would have too few (cv < 1) or too many arrivals at its start."""
    for process in ("gamma:3", "gamma:0.2", "constant"):
        source = prepare(process, seconds=2)
        counts = [len(source.draw(1, seed)) for seed in range(4000)]
        assert np.mean(counts) == pytest.approx(2.0, abs=0.25), process


def test_counts_become_rates(tmp_path: Path) -> None:
    times = prepare(write(tmp_path, COUNTS)).draw(15_000, seed=1)
    assert per_second(times, 4) == pytest.approx([10_000, 0, 30_000, 20_000], rel=0.03)
    within = times[times < 1.0]
    assert within.std() == pytest.approx(np.sqrt(1 / 12), rel=0.03)  # even within the second
    assert cv(np.diff(within)) == pytest.approx(1.0, rel=0.03)  # and Poisson there


def test_steps_of_other_lengths(tmp_path: Path) -> None:
    source = prepare(write(tmp_path, "seconds_offset,requests\n100,60\n160,30\n190,90\n"))
    assert source.length == 120.0  # the last step is as long as the one before
    times = source.draw(300, seed=1)
    assert np.histogram(times, [0, 60, 90, 120])[0] == pytest.approx([12_000, 6_000, 18_000], rel=0.04)


def test_rows_as_seconds(tmp_path: Path) -> None:
    source = prepare(write(tmp_path, "seconds_offset,requests\n0,1000\n3600,3000\n7200,2000\n"), as_seconds=True)
    assert source.length == 3.0
    assert per_second(source.draw(20_000, seed=1), 3) == pytest.approx([10_000, 30_000, 20_000], rel=0.03)


def test_stamps_become_counts_of_seconds(tmp_path: Path) -> None:
    source = prepare(write(tmp_path, "arrival_s\n0.5\n2.1\n2.2\n2.9\n"))
    assert source.length == 3.0
    assert per_second(source.draw(20_000, seed=1), 3) == pytest.approx([15_000, 0, 45_000], rel=0.03)


def test_steps_by_text() -> None:
    source = parse_source("step:1x60,3x30")
    assert source.length == 90.0
    assert np.histogram(source.draw(500, seed=1), [0, 60, 90])[0] == pytest.approx([18_000, 27_000], rel=0.03)


def test_the_rate_is_that_of_the_window(tmp_path: Path) -> None:
    source = prepare(write(tmp_path, COUNTS), window=(0.5, 3.0))
    assert source.length == 2.5
    times = source.draw(10_000, seed=2)
    assert np.histogram(times, [0, 0.5, 1.5, 2.5])[0] == pytest.approx([25_000 / 7, 0, 150_000 / 7], rel=0.06, abs=0)


def test_windows_of_processes_have_the_rate() -> None:
    times = prepare("poisson", window=(330, 450)).draw(100, seed=1)
    assert len(times) == pytest.approx(12_000, rel=0.03)
    assert 0 <= times[0] < times[-1] < 120


def test_seconds_are_the_first_of_a_window(tmp_path: Path) -> None:
    path = write(tmp_path, COUNTS)
    first = prepare(path, window=(2, 4), seconds=1.0)
    assert first.length == 1.0
    assert np.array_equal(first.draw(50, 1), prepare(path, window=(2, 3)).draw(50, 1))
    with pytest.raises(TraceError, match="do not fit into the window 2:4"):
        prepare(path, window=(2, 4), seconds=3.0)


def test_superposed_copies_are_shifted_and_wrapped(tmp_path: Path) -> None:
    source = prepare(write(tmp_path, COUNTS), superpose=2)
    assert source.length == 4.0
    assert per_second(source.draw(30_000, 1), 4) == pytest.approx([40_000, 20_000, 40_000, 20_000], rel=0.03)


def test_superposing_steps_that_do_not_divide_the_length() -> None:
    times = parse_source("step:1x60,3x30").superpose(2).draw(1000, 1)
    # Shifted by 45 s: 3 in 60..90, and 3 in 15..45; 1 elsewhere.
    expected = np.array([2, 4, 2, 4]) * [15, 30, 15, 30] * 300
    assert np.histogram(times, [0, 15, 45, 60, 90])[0] == pytest.approx(expected, rel=0.03)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=40).filter(any), st.integers(1, 7))
def test_superposition_keeps_all_requests(counts: list[int], copies: int) -> None:
    trace = Trace("t", np.arange(len(counts) + 1, dtype=np.float64), np.array(counts, dtype=np.float64))
    several = trace.superpose(copies)
    assert several.length == trace.length
    assert (several.rates * np.diff(several.edges)).sum() == pytest.approx(copies * sum(counts))


def test_the_azure_trace_superposed() -> None:
    path = shared_trace("azure_llm2023_code_arrivals.csv")
    for copies, expected in ((1, 2.27), (3, 1.39), (4, 1.22)):
        source = prepare(path, superpose=copies)
        assert source.length == 3436.0
        assert cv(per_second(source.draw(1000, 1), 3436)) == pytest.approx(expected, abs=0.02)


def test_the_twitter_window() -> None:
    source = prepare(shared_trace("twitter_ipa_bursty_per_second.csv"), window=(330, 450))
    times = source.draw(2000, 1)
    assert len(times) == pytest.approx(240_000, rel=0.01)
    assert source.name == "twitter_ipa_bursty_per_second 330:450"


def test_wikipedia_hours_as_seconds() -> None:
    source = prepare(shared_trace("wikipedia_en_2014-03_4weeks_hourly.csv"), as_seconds=True, window=(0, 300))
    assert cv(per_second(source.draw(10_000, 1), 300)) < 0.3


@pytest.mark.parametrize("process", ["poisson", "constant", "gamma:2", "step:1x4,2x8"])
def test_the_same_seed_gives_the_same_arrivals(process: str) -> None:
    def draw(seed: int | list[int]) -> Floats:
        return prepare(process, seconds=10).draw(100, seed)

    times = draw(1)
    assert times.dtype == np.float64
    assert np.array_equal(times, draw(1))
    assert not np.array_equal(times, draw(2))
    assert not np.array_equal(draw([1, 1]), draw([1, 2]))
    assert (np.diff(times) >= 0).all()
    assert 0 <= times[0] < times[-1] < 10


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty; a trace's first line is"),
        ("time,count\n1,2\n", "has the columns time, count; a trace's first line is"),
        ("seconds_offset\n1\n", "has the columns seconds_offset"),
        ("seconds_offset,requests\n", "no rows"),
        ("arrival_s\n", "no rows"),
        ("seconds_offset,requests\n0,5\n", "one row only"),
        ("seconds_offset,requests\n0,5\n1,-2\n", r"trace.csv:3: requests must be a number of 0 or more, not '-2'"),
        ("seconds_offset,requests\n0,5\n1\n", "trace.csv:3: requests must be a number of 0 or more, not ''"),
        ("seconds_offset,requests\n0,5\n1,many\n", "not 'many'"),
        ("seconds_offset,requests\n0,5\n1,inf\n", "not 'inf'"),
        ("seconds_offset,requests\n0,5\n0,6\n", "trace.csv:3: seconds_offset must ascend, but 0 follows 0"),
        ("arrival_s\n1.5\n0.5\n", "trace.csv:3: arrival_s must ascend, but 0.5 follows 1.5"),
        ("arrival_s\n-1\n", "not '-1'"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        parse_source(write(tmp_path, text))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81" * 10)
    with pytest.raises(TraceError, match="is not a CSV file"):
        parse_source(str(tmp_path / "binary.csv"))
    with pytest.raises(TraceError, match="cannot be read: Is a directory"):
        parse_source(str(tmp_path))


def test_a_spreadsheet_s_file(tmp_path: Path) -> None:
    """A byte order mark, other columns, spaces and blank lines do no harm."""
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfrequests, note, seconds_offset\r\n5,a,0\r\n\r\n7,b, 2\r\n")
    source = parse_source(str(tmp_path / "t.csv"))
    assert isinstance(source, Trace)
    assert source.edges.tolist() == [0, 2, 4]
    assert source.rates.tolist() == [2.5, 3.5]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("poison", r"no trace file 'poison'; a process is one of poisson, constant, gamma:CV"),
        ("gamma", "gamma:CV needs"),
        ("gamma:-1", "from 0.05 to 20, not '-1'"),
        ("gamma:x", "not 'x'"),
        ("step:", "relative rates and seconds"),
        ("step:1x", "not '1x'"),
        ("step:1x5,-2x5", "not '-2x5'"),
    ],
)
def test_bad_processes(text: str, reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        parse_source(text)


@pytest.mark.parametrize("window", [(0, 5), (4, 8), (-1, 2), (3, 3), (3, 1)])
def test_windows_outside(tmp_path: Path, window: tuple[float, float]) -> None:
    with pytest.raises(TraceError, match=r"within 0:4|with 0 <= BEGIN < END"):
        prepare(write(tmp_path, COUNTS), window=window)


def test_windows_by_text() -> None:
    assert parse_window("330:450") == (330.0, 450.0)
    assert parse_window("0.5:1") == (0.5, 1.0)
    for text in ("330", "330:", ":5", "5:3", "a:b", "-1:5", "1:2:3", "0:inf", "nan:3"):
        with pytest.raises(TraceError, match="BEGIN:END in seconds"):
            parse_window(text)


def test_what_has_no_end_or_no_requests(tmp_path: Path) -> None:
    endless = parse_source("poisson")
    path = write(tmp_path, COUNTS)
    attempts = [
        (lambda: prepare("poisson"), "has no end"),
        (lambda: endless.draw(10, 1), "has no end"),
        (lambda: endless.superpose(2), "only traces can be superposed"),
        (lambda: endless.as_seconds(), "no rows to read as seconds"),
        (lambda: prepare(path, superpose=0), "at least 1, not 0"),
        (lambda: prepare(path, window=(1, 2)).draw(10, 1), "has no requests"),
        (lambda: prepare(path).draw(0, 1), "above 0"),
        (lambda: prepare(path).draw(-3, 1), "above 0"),
        (lambda: prepare(path).draw(1e12, 1), "lower the rate or shorten"),
        (lambda: prepare(path, seconds=9), "outside of trace, which is 4 s long"),
    ]
    for attempt, reason in attempts:
        with pytest.raises(TraceError, match=reason):
            attempt()
    stamps = write(tmp_path, "arrival_s\n1\n2\n")
    with pytest.raises(TraceError, match="stamps, which are seconds already"):
        prepare(stamps, as_seconds=True)


def test_names_say_what_was_made_of_a_trace(tmp_path: Path) -> None:
    source: Source = prepare(write(tmp_path, COUNTS), as_seconds=True, superpose=2, window=(1, 3))
    assert source.name == "trace as seconds x2 1:3"
