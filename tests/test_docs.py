"""Every command in the documentation is run, page by page, as somebody would who tries everything.

What stands in blocks is run in order, in one directory, with the files that the page shows; so are programs that use
the SDK. What stands in sentences must be a command with options that exist. `RULES` has what cannot be run as it is:
hosts that are not there, ports and directories that others may have, durations of no use here.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from documented import Command, File, Mention, Program, read, words

from cli.main import main
from cluster.store import open_store, sqlite_url
from pipelines.ocr.samples import draw_note

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
READY = 60.0
"""Seconds that what runs until it is stopped may take to begin."""


@dataclass(frozen=True)
class Rule:
    """Commands that match ``pattern``: ``become`` is what is run instead ('' nothing), ``why`` is why."""

    pattern: str
    become: str
    why: str
    status: int = 0


RULES = [
    Rule(
        r"laxity record traffic.rec --duration 60s",
        "laxity record traffic.rec --duration 4s & laxity load lv --request-rate-range 20 --duration 1s",
        "nobody else sends requests here",
    ),
    Rule(r"(python3 -m venv|\. ).*", "", "the tests run in an environment that has it all"),
    Rule(r"(.*) --duration (?:[1-9]\d|[5-9])s(.*)", r"\g<1> --duration 2s\g<2>", "more of the same"),
    Rule(r"(.*)--window 330:450(.*)", r"\g<1>--window 2:6\g<2>", "the trace here is short"),
    Rule(r"(laxity simulate .*)--gpus 64(?: --split \S+)?(.*)", r"\g<1>--gpus 12\g<2>", "a fifth of the requests"),
    Rule(r"(laxity simulate .*)--policy all(.*)", r"\g<1>--policy laxity,nexus\g<2>", "each policy has its own test"),
    Rule(
        r"(.*tcp://)10\.0\.0\.7:7\d00(.* )--backend tcp://10\.0\.0\.7:7\d00(.*)",
        r"\g<1>127.0.0.1:*\g<2>\g<3>",
        "no such host",
    ),
    Rule(r"export LAXITY_STORE=\S+ (.*)", r"export \g<1> LAXITY_STORE={store}", "no such hosts"),
    Rule(r"(laxity .*)/etc/laxity/(\S+\.key.*)", r"\g<1>\g<2>", "somebody may have that directory"),
    Rule(r"(.*)/var/tmp/rows(.*)", r"\g<1>rows\g<2>", "somebody may have that directory"),
    Rule(r"(.*)host-\*/rows(.*)", r"\g<1>ro*s\g<2>", "rows of one host"),
    Rule(r"(laxity telemetry .* --limit 20)", r"\g<1>", "none are dropped"),
    Rule(
        r"(laxity submit (?:lv|reviews) (?!.*(?:--field|\|\|)).*)",
        r"\g<1> || \g<1> || \g<1>",
        "while other tests run, the machine may take longer than the objective",
    ),
    Rule(r"(laxity submit reviews .* --field .*)", r"\g<1>", "it is told to fail", status=1),
]
SERVICE = re.compile(r"laxity (broker|node|coordinator) run")
FOREVER = re.compile(
    r"laxity (broker|node|coordinator|gateway) run|laxity dashboard|laxity (telemetry|trace) .*--follow"
)
"""What goes on until it is stopped, beside `laxity up`."""
LATE = re.compile(r"\b(Dropped|Expired|dropped|expired)\b")
TRIES = 4
"""A busy machine may be too slow for what a page asks for within its SLO; that is no mistake of the page's."""
BEFORE = {
    "overload": ["laxity up lv --gpus 16 --coordinators 1 --detach"],
}
"""What a page takes for granted."""


@pytest.fixture(scope="module")
def laxity() -> Path:
    """The command as it is installed."""
    command = Path(sys.executable).parent / "laxity"
    if not command.exists():
        pytest.skip("laxity is not installed as a command beside this Python")
    return command


class Reader:
    """Somebody at a terminal, in a directory of their own."""

    def __init__(self, directory: Path, laxity: Path) -> None:
        self._directory = directory
        self._environment = os.environ | {
            "XDG_RUNTIME_DIR": str(directory / "run"),
            "PATH": f"{laxity.parent}:{os.environ['PATH']}",
            "COLUMNS": "120",
        }
        (directory / "run").mkdir()
        self._forever: list[subprocess.Popen[bytes]] = []
        self._store = sqlite_url(directory / "store.db")
        self._detached = False

    def prepare(self) -> None:
        """What pages take for granted: pictures, a trace, models."""
        for name in ("receipt.png", "letter.png"):
            (self._directory / name).write_bytes(draw_note(["Dear Sir,", "your invoice 4711", "is 20 days late"]))
        counts = [40, 60, 80, 120, 90, 60, 70, 50]
        rows = "".join(f"{second},{count}\n" for second, count in enumerate(counts))
        (self._directory / "trace.csv").write_text(f"seconds_offset,requests\n{rows}")
        (self._directory / "models").mkdir()
        for name in ("one", "two"):
            stage = "only: {executor: emulated, profile: {alpha_ms: 1, beta_ms: 5}}"
            text = f"name: {name}\nslo: 1s\nstages:\n  {stage}\noutput: only\n"
            (self._directory / "models" / f"{name}.yaml").write_text(text)

    def write(self, file: File) -> None:
        text = re.sub(r"etcd://\S+", self._store, file.text)
        text = text.replace("devices: cuda", "devices: cpu").replace("10.0.0.7:7100", "127.0.0.1:*")
        text = text.replace("10.0.0.7:7200", "127.0.0.1:*").replace("/var/cache/laxity", str(self._directory / "cache"))
        path = self._directory / file.name.removeprefix("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if file.name == "/etc/laxity.yaml":
            self._environment["LAXITY_CONFIG"] = str(path)

    def run(self, command: str) -> None:
        """Run a command, or what stands for it here; it must do what it says."""
        status = 0
        for rule in RULES:
            if re.fullmatch(rule.pattern, command):
                become = re.sub(f"^{rule.pattern}$", rule.become, command)
                command, status = become.replace("{store}", self._store), max(status, rule.status)
        if not command:
            return
        program = command.split()[0]
        if program == "make":
            assert re.search(rf"^{words(command)[1]}:", MAKEFILE, re.MULTILINE), command
        elif program == "pip":
            self._installable(words(command))
        elif program == "export":
            for word in words(command)[1:]:
                name, _, value = word.partition("=")
                self._environment[name] = value
        elif FOREVER.match(command):
            self._begin(command)
        elif program == "laxity" and words(command)[1] == "up":
            self.end()
            for setting in ("STORE", "CLUSTER", "CONFIG", "KEY"):  # another cluster, another terminal
                self._environment.pop(f"LAXITY_{setting}", None)
            if "--detach" in command:
                self._finish(command, 0)
                self._detached = True
            else:
                self._begin(command)
        else:
            self._finish(command, status)
            if command.startswith("laxity down"):
                self._detached = False

    def program(self, text: str) -> None:
        """Run a program that uses the SDK, with the address of the cluster that runs here."""
        address = subprocess.run(
            ["laxity", "status", "--json"], env=self._environment, cwd=self._directory, capture_output=True, text=True
        ).stdout
        found = re.search(r'"frontend": "([^"]+)"', address)
        assert found is not None, address
        file = self._directory / "program.py"
        file.write_text(re.sub(r"tcp://127\.0\.0\.1:\d+", found[1], text))
        self._finish(f"{sys.executable} {file}", 0)

    def end(self) -> None:
        """Press Ctrl-C wherever something runs; that is no error."""
        for process in reversed(self._forever):
            assert process.poll() is None, f"{process.args} ended by itself"
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(READY) in (0, 130, -signal.SIGINT), process.args
        self._forever.clear()
        if self._detached:
            self._finish("laxity down", 0)
            self._detached = False

    def kill(self) -> None:
        """Leave nothing behind, whatever went wrong."""
        for process in self._forever:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        subprocess.run(["laxity", "down"], env=self._environment, capture_output=True)

    def _finish(self, command: str, status: int) -> None:
        for _ in range(TRIES):
            result = subprocess.run(
                ["bash", "-c", command],
                env=self._environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            if result.returncode == status or not LATE.search(result.stdout + result.stderr):
                break
        assert result.returncode == status, f"{command}\n{result.stdout}{result.stderr}"

    def _begin(self, command: str) -> None:
        log = self._directory / f"log-{len(self._forever)}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                env=self._environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._forever.append(process)
        pause = threading.Event()
        ends = time.monotonic() + READY
        while " up " in command and b"Ctrl-C" not in log.read_bytes():
            assert process.poll() is None, f"{command}\n{log.read_text()}"
            assert time.monotonic() < ends, f"{command} does not get ready\n{log.read_text()}"
            pause.wait(0.05)
        while re.match("laxity (dashboard|gateway)", command) and b"127.0.0.1:" not in log.read_bytes():
            assert process.poll() is None, f"{command}\n{log.read_text()}"
            assert time.monotonic() < ends, f"{command} does not say where it is\n{log.read_text()}"
            pause.wait(0.05)
        while SERVICE.match(command) and not self._registered():
            assert process.poll() is None, f"{command}\n{log.read_text()}"
            assert time.monotonic() < ends, f"{command} does not register\n{log.read_text()}"
            pause.wait(0.05)

    def _registered(self) -> bool:
        """Whether all services that run in the foreground here are known to the store."""
        url = self._store
        opened = open_store(url)
        try:
            found = opened.list("/laxity/").entries
        finally:
            opened.close()
        kinds = ("brokers", "nodes", "coordinators")
        known = [entry.key for entry in found if entry.key.split("/")[3] in kinds]
        return len(known) >= sum(bool(SERVICE.search(process.args[2])) for process in self._forever)

    def _installable(self, arguments: list[str]) -> None:
        """What is to be installed must exist: the project's extras, and what the Makefile installs as well."""
        for word in arguments[2:]:
            extras = re.fullmatch(r"(?:\.|laxity)\[([\w,]+)\]", word)
            if extras is not None:
                assert set(extras[1].split(",")) <= PROJECT["optional-dependencies"].keys(), word
            else:
                assert word in (".", "--no-deps", "laxity") or word in MAKEFILE, word


@pytest.fixture
def reader(tmp_path: Path, laxity: Path) -> Iterator[Reader]:
    made = Reader(tmp_path, laxity)
    made.prepare()
    yield made
    made.kill()


def does_something(page: Path) -> bool:
    if page.stem == "gateway":
        return False  # test_gateway_ocr.py does what it says
    return any(isinstance(step, (Command, Program)) for step in read(page))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", [page for page in PAGES if does_something(page)], ids=lambda page: page.stem)
def test_what_a_page_says_is_so(page: Path, reader: Reader) -> None:
    if "etcd" in page.read_text() and "--store etcd" in page.read_text() and not shutil.which("etcd"):
        pytest.skip("needs etcd (Debian's package: etcd-server)")
    for command in BEFORE.get(page.stem, []):
        reader.run(command)
    # A page shows a file where it speaks of it, which may be after the command that wants it.
    steps = list(read(page))
    for step in reversed(steps):
        if isinstance(step, File):
            reader.write(step)
    for step in steps:
        if isinstance(step, File):
            reader.write(step)
        elif isinstance(step, Command):
            reader.run(step.text)
        elif isinstance(step, Program):
            reader.program(step.text)
    reader.end()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_mentioned_exists(page: Path) -> None:
    for step in read(page):
        if isinstance(step, Mention):
            check(step.text, f"{page.name}:{step.line}")


def check(text: str, where: str) -> None:
    """Whether these words are a command with options that exist (arguments may be left out)."""
    command: click.Command = main
    rest = [word for word in words(text.replace("...", "").replace("…", "")) if word][1:]
    while isinstance(command, click.Group) and rest:
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, f"{where}: there is no {text!r}"
        command = found
        rest = rest[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("--") and word != "--help":
            assert word.partition("=")[0] in options, f"{where}: {text!r} has no option {word}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
