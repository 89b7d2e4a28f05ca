"""Searches for inputs that what reads others' bytes does not survive: ``python tests/fuzz/run.py --seconds 600``.

Each target (see ``targets.py``) runs in a process of its own, for its share of the time, with libFuzzer's coverage of
this project's modules to go by (Atheris). An input that raises what it should not, takes longer than TOO_LONG seconds
of the processor, or more memory than TOO_MUCH, is kept in the findings' directory; the search goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Final

import click

sys.path.insert(0, str(Path(__file__).parents[1]))
TOO_LONG: Final = 2.0
TOO_MUCH: Final = 512 * 1024**2
"""Bytes of address space beside what the process has before the first input: some is libFuzzer's own."""
MOST_INPUT: Final = 8192
INTERESTING: Final[list[Any]] = [
    *(0, -1, 1, 255, 2**31, -(2**31), 2**53, 2**63 - 1, -(2**63), 2**64 - 1),
    *(0.0, -0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
    *("", "x" * 300, "\0", "é", "../x", None, True, False, b"", b"xyz", [], {}, [[]]),
]


# ---- one target, in a process of its own ----------------------------------------------------------------------------


def search(name: str, seconds: int, seed: int, findings: Path, tally: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(
        include=["laxity", "pipelines", "cluster", "broker", "nodes", "simulation", "cli", "yaml"],
        enable_loader_override=False,
    ):
        from fuzz.targets import TARGETS
    logging.disable()
    target = TARGETS[name]
    known: set[str] = set()
    executions = 0
    began = told = time.monotonic()

    def tell() -> None:
        tally.write_text(json.dumps({"executions": executions, "seconds": time.monotonic() - began}))

    def keep(raw: bytes, why: str, trace: str) -> None:
        if why not in known:
            known.add(why)
            file = findings / f"{name}-{hashlib.sha256(why.encode()).hexdigest()[:8]}"
            file.write_bytes(raw)
            file.with_suffix(".txt").write_text(f"{why}\n\n{trace}")

    def once(raw: bytes) -> None:
        nonlocal executions, told
        executions += 1
        if time.monotonic() > told + 1.0:
            told = time.monotonic()
            tell()
        before = time.process_time()
        try:
            target.run(raw)
        except Exception as error:
            last = [frame for frame in traceback.extract_tb(error.__traceback__) if "/fuzz/" not in frame.filename]
            where = f"{last[-1].filename}:{last[-1].name}" if last else "the target"
            keep(raw, f"{type(error).__name__} in {where}", traceback.format_exc())
        took = time.process_time() - before
        if took > TOO_LONG:
            keep(raw, f"slow: more than {TOO_LONG} s", f"{took:.1f} s")

    def change(raw: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.3:
            return bytes(atheris.Mutate(raw, most))
        changed = structured(raw, target.form, target.tokens, chance)
        return changed[:most] if changed is not None else bytes(atheris.Mutate(raw, most))

    with tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(target.seeds()):
            Path(corpus, f"seed{number}").write_bytes(content)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + TOO_MUCH
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        arguments = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={MOST_INPUT}", "-timeout=60"]
        atheris.Setup([sys.argv[0], corpus, *arguments, "-verbosity=0"], once, custom_mutator=change)
        tell()
        atheris.Fuzz()


def structured(raw: bytes, form: str, tokens: tuple[str, ...], chance: random.Random) -> bytes | None:
    """``raw`` changed in a way that leaves it of its form; None where it is not of it."""
    if form == "text":
        return _text(raw, tokens, chance)
    head, tree = b"", None
    try:
        if form == "msgpack":
            import msgpack

            # Files of several objects have one of them changed.
            unpacker = msgpack.Unpacker(strict_map_key=False, unicode_errors="surrogatepass", max_buffer_size=1 << 20)
            unpacker.feed(raw)
            trees = list(unpacker)
            at = chance.randrange(len(trees))
            trees[at] = _change(trees[at], tokens, chance)
            return b"".join(msgpack.packb(each, unicode_errors="surrogatepass") for each in trees)
        brace = raw.find(b"{")
        end = raw.rfind(b"}") + 1
        head, rest = raw[:brace], raw[end:]
        tree = _change(json.loads(raw[brace:end]), tokens, chance)
        return head + json.dumps(tree, default=lambda value: value.decode("latin-1")).encode() + rest
    except Exception:
        return None


def _text(raw: bytes, tokens: tuple[str, ...], chance: random.Random) -> bytes:
    at, other = sorted((chance.randint(0, len(raw)), chance.randint(0, len(raw))))
    way = chance.randrange(5)
    if way == 0 and tokens:
        return raw[:at] + chance.choice(tokens).encode("utf-8", "surrogatepass") + raw[at:]
    if way == 1 and tokens:
        return raw[:at] + chance.choice(tokens).encode("utf-8", "surrogatepass") + raw[other:]
    if way == 2:
        return raw[:at] + raw[at:other] * chance.choice((0, 2, 3, 50)) + raw[other:]
    lines = raw.splitlines(keepends=True)
    if way == 3 and lines:
        lines.insert(chance.randint(0, len(lines)), chance.choice(lines))
        return b"".join(lines)
    changed = bytearray(raw or b"x")
    changed[chance.randrange(len(changed))] = chance.choice(b"\0\n\t \"'{}[]:,&*!|>%@`#-?0123456789.eE+_~\xff")
    return bytes(changed)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    found = []
    heap = [tree]
    while heap:
        each = heap.pop()
        pairs = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
        for key, value in pairs:
            found.append((each, key))
            heap.append(value)
    return found


def _change(tree: Any, tokens: tuple[str, ...], chance: random.Random) -> Any:
    top = [tree]
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = _places(top)
        within, key = chance.choice(places)
        value = within[key]
        way = chance.randrange(8)
        if way == 0 and tokens:
            within[key] = chance.choice(tokens)
        elif way in (1, 2):
            within[key] = chance.choice(INTERESTING)
        elif way == 3 and isinstance(value, int | float):
            within[key] = value + chance.choice((-1, 1, 0.5, 256))
        elif way == 4 and isinstance(value, list) and value:
            value.insert(chance.randint(0, len(value)), chance.choice(value))
        elif way == 5 and isinstance(value, list) and value:
            del value[chance.randrange(len(value))]
        elif way == 6:
            other, name = chance.choice(places)
            within[key] = json.loads(json.dumps(other[name])) if not isinstance(other[name], bytes) else other[name]
        elif way == 7:
            for _ in range(chance.choice((1, 2, 40, 600))):
                value = [value]
            within[key] = value
        elif isinstance(value, bytes):
            within[key] = value + bytes([chance.randrange(256)])
        else:
            within[key] = chance.choice(INTERESTING)
    return top[0]


# ---- all of them ----------------------------------------------------------------------------------------------------


@click.command()
@click.argument("names", nargs=-1)
@click.option("--seconds", default=60, show_default=True, help="For each target.")
@click.option("--seed", type=int, help="Else another one each time.")
@click.option("--findings", type=click.Path(path_type=Path), default=Path("build/fuzz"), show_default=True)
@click.option("--child", type=click.Path(path_type=Path), hidden=True)
def main(names: tuple[str, ...], seconds: int, seed: int | None, findings: Path, child: Path | None) -> None:
    """Search the targets NAMES (else all) for inputs that they do not survive; exits with 1 where some are found."""
    findings.mkdir(parents=True, exist_ok=True)
    if child is not None:
        search(names[0], seconds, seed or 0, findings, child)
    from fuzz.targets import TARGETS

    found = 0
    total = 0
    click.echo(f"{'target':<20} {'executions':>12} {'seconds':>8} {'findings':>9}")
    for name in names or TARGETS:
        before = set(findings.glob(f"{name}-*.txt"))
        tally = findings / f"{name}.json"
        tally.unlink(missing_ok=True)
        number = seed if seed is not None else random.SystemRandom().randrange(2**31)
        command = [sys.executable, __file__, name, f"--seconds={seconds}", f"--seed={number}", f"--findings={findings}"]
        with (findings / f"{name}.log").open("wb") as log:
            process = subprocess.run([*command, f"--child={tally}"], stdout=log, stderr=log, check=False)
        told = json.loads(tally.read_text()) if tally.exists() else {"executions": 0, "seconds": 0.0}
        new = set(findings.glob(f"{name}-*.txt")) - before
        died = f"  ended with {process.returncode}, see {name}.log (--seed={number})" if process.returncode else ""
        click.echo(f"{name:<20} {told['executions']:>12,} {told['seconds']:>8.0f} {len(new):>9}{died}")
        for file in sorted(new):
            click.echo(f"    {file}: {file.read_text().splitlines()[0]}")
        found += len(new) + bool(died)
        total += told["executions"]
    click.echo(f"{'all':<20} {total:>12,}")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("PYTHONHASHSEED", "0")
    main()
