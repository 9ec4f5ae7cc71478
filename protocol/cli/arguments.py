"""Arguments that several commands have, and command lines that end in another command's."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Image = Annotated[str, typer.Argument(metavar="IMAGE", help="An image reference, as in docker.")]
PlatformOption = Annotated[
    str | None,
    typer.Option("--platform", metavar="OS/ARCH[/VARIANT]", help="Default: the VM's own."),
]


class CommandAfterOptions(TyperCommand):
    """Options end where the command starts: ``exec ls -l`` leaves ``-l`` to ls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_interspersed_args = False


class CommandAfterImage(CommandAfterOptions):
    """The same with an image before the command, and options on either side of it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options, words = self._split(ctx, args)
        more_options, command = self._split(ctx, words[1:])
        return super().parse_args(ctx, [*options, *more_options, "--", *words[:1], *command])

    def _split(self, ctx: Any, args: list[str]) -> tuple[list[str], list[str]]:
        """Leading options and what follows them; a ``--`` between them is dropped."""
        values, _, _ = self.make_parser(ctx).parse_args(list(args))
        words_count = len(values.get("command") or ()) + (values.get("image") is not None)
        options, words = args[: len(args) - words_count], args[len(args) - words_count :]
        if options[-1:] == ["--"]:
            options.pop()
        return options, words
