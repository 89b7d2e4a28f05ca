"""``laxity demo``: the whole way, from nothing to the text of the sample pictures, and back to nothing."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.children import ChildDied
from cli.local_cluster import ClusterError, Interrupted, LocalCluster
from cli.local_setup import Setup
from cli.options import explain_errors
from cli.progress import LoadingDisplay
from cli.render import text_lines
from cli.rundir import RunDirectory
from cli.submit import print_timings
from cli.up import Signals, real_devices, say
from cluster.layout import Wish, lay_out
from laxity import Client
from laxity.reply import Reply
from pipelines import PipelineSpec, format_duration, load_spec

if TYPE_CHECKING:
    from pipelines.ocr.samples import Sample


@click.command()
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path), help="Write the pictures into this directory."
)
@explain_errors
def demo(keep: Path | None) -> None:
    """Start a cluster, read the text of pictures drawn here, show how it went, and end it again.

    Exit status 0 only if every line on the pictures was read. Needs pip install 'laxity[ocr]'.

    \b
    Examples:
      laxity demo
      laxity demo --keep pictures
    """
    samples = _draw()
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for sample in samples:
            (keep / f"{sample.name}.png").write_bytes(sample.png)
    spec = load_spec("ocr")
    signals = Signals()
    with tempfile.TemporaryDirectory(prefix="laxity-demo-") as base:
        try:
            with LocalCluster(RunDirectory("demo", Path(base)), None, signals.came, say) as cluster:
                with LoadingDisplay() as display:
                    layouts = lay_out([spec], Wish(), *real_devices())
                    cluster.start(Setup(specs=[spec], layouts=layouts), display.show)
                    (address,) = cluster.wait_ready(display.show)
                good = _submit(address, spec, samples, signals)
        except Interrupted:
            raise click.ClickException("interrupted; everything has been ended") from None
        except (ClusterError, ChildDied) as error:
            raise click.ClickException(str(error)) from error
    click.echo("Every line was read." if good else "Not every line was read as it should be.")
    sys.exit(0 if good else 1)


def _draw() -> list[Sample]:
    from pipelines.ocr.samples import draw_samples

    try:
        return draw_samples()
    except ImportError as error:
        raise click.ClickException(f"the demo needs the package {error.name}: pip install 'laxity[ocr]'") from error


def _submit(address: str, spec: PipelineSpec, samples: list[Sample], signals: Signals) -> bool:
    good = True
    with Client(address, key="") as client:
        for sample in samples:
            if signals.came():
                raise Interrupted
            reply = client.submit(spec.name, sample.png, timings=True).reply()
            good &= _print(sample, reply, spec.slo)
    return good


def _print(sample: Sample, reply: Reply, slo: float) -> bool:
    """Show one picture's answer; whether it is what is on the picture."""
    click.echo(f"\n== {sample.name}: {len(sample.png)} bytes of PNG, {len(sample.lines)} lines of text on it")
    if not reply.ok:
        click.echo(f"  {reply.error()}")
        return False
    lines = text_lines(reply.value) or []
    for text, confidence in lines:
        click.echo(f"  {confidence:.2f}  {text}")
    print_timings([reply])
    click.echo(f"  {format_duration(reply.remaining)} of its {format_duration(slo)} were left")
    read = Counter(text for text, _ in lines)
    expected = Counter(sample.lines)
    for text in (expected - read).elements():
        click.echo(f"  not read: {text!r}")
    for text in (read - expected).elements():
        click.echo(f"  not on the picture: {text!r}")
    return read == expected
