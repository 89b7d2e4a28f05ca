"""Groups of commands that tell people what there is."""

from __future__ import annotations

from difflib import get_close_matches

import click


class Group(click.Group):
    """Of a command that there is not, it names those that are spelt like it, or all; and it lists commands with the
    whole first sentence of what they do."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            known = self.list_commands(ctx)
            meant = get_close_matches(name, known)
            hint = f"did you mean {' or '.join(meant)}?" if meant else f"there are {', '.join(known)}"
            raise click.UsageError(f"there is no command {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, self.commands[name].get_short_help_str(200)) for name in self.list_commands(ctx)]
            )
