"""``laxity``: the command line. Commands are imported when they are run, so that ``--help`` is quick."""

from __future__ import annotations

import errno
import os
import signal
import sys
from importlib import import_module
from typing import Any

import click

from cli.groups import Group

COMMANDS = {
    "up": ("cli.up:up", "Start a cluster on this machine and serve pipelines."),
    "down": ("cli.down:down", "End a cluster that `up` started."),
    "status": ("cli.status:status", "Show what a cluster consists of and how it does."),
    "top": ("cli.top.command:top", "Watch a cluster live; drain a node from there."),
    "dashboard": ("cli.dashboard.command:dashboard", "Serve a web page that shows a cluster live."),
    "submit": ("cli.submit:submit", "Send requests to a pipeline and print the answers."),
    "load": ("cli.load.command:load", "Send requests at a rate, and tell how they ended."),
    "record": ("cli.record:record", "Record the requests that come to a cluster."),
    "trace": ("cli.trace:trace", "Show where a request's time went, and why it was dropped."),
    "telemetry": ("cli.telemetry:telemetry", "Read what shards and agents wrote of requests."),
    "simulate": ("cli.simulate:simulate", "Simulate pipelines on many GPUs, and compare policies."),
    "profile": ("cli.profile:profile", "Measure a pipeline's stages on this host's devices."),
    "pipeline": ("cli.pipeline:pipeline", "Check, apply, list, show and delete pipelines."),
    "demo": ("cli.demo:demo", "Read the text of sample pictures, from start to end."),
    "keys": ("cli.keys:keys", "Say who is let into a cluster, and with which keys."),
    "doctor": ("cli.doctor:doctor", "Look for what is wrong with this installation."),
    "broker": ("cli.services:broker", "Run a broker shard (a service; `up` starts it for you)."),
    "node": ("cli.node:node", "List, drain and resume nodes; run a node agent."),
    "coordinator": ("cli.services:coordinator", "Run a coordinator (a service; `up` starts it for you)."),
    "gateway": ("cli.services:gateway", "Serve the Open Inference Protocol (Triton, KServe)."),
}
"""By command name: where it is, and what the list of commands says of it."""
HIDDEN = {"observe": "cli.observe:observe"}
"""Commands that only processes of a cluster start."""


_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class LazyGroup(Group):
    """A group whose commands are imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        where = COMMANDS[cmd_name][0] if cmd_name in COMMANDS else HIDDEN.get(cmd_name)
        if where is None:
            return None
        module, _, name = where.partition(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[1:2] == ["run"]:
            # A service, which is still to be imported: a hang-up would end it. It is about to read its configuration
            # anyway, and takes its signals itself then (cli/control.py).
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # Here, and not in each command: it may come while that is imported.
            click.echo("Interrupted.", err=True)
            sys.exit(130)
        except OSError as error:
            if error.errno not in _UNWRITTEN:
                raise
            # What could not be written still lies in the buffer, and would fail once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.ClickException(f"the output cannot be written: {error.strerror}") from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="laxity", prog_name="laxity")
def main() -> None:
    """Serve pipelines of DNN models inside a latency objective.

    \b
    Examples:
      laxity up ocr                      serve the shipped pipeline `ocr` here
      laxity submit ocr picture.png      send it a picture
      laxity up lv --gpus 64             a pipeline on 64 emulated GPUs
      laxity COMMAND --help              what a command does, with examples

    Exit status: 0 good, 1 failed, 2 wrong use, 130 interrupted by Ctrl-C.
    """


if __name__ == "__main__":
    main()
