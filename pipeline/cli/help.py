"""Help as pages that a person would want: options in sections, examples, and completion in a shell."""

from __future__ import annotations

import os
import sys
from typing import Any

import click
from click.shell_completion import CompletionItem, shell_complete

_SECTIONS = {
    "Which windows": (
        *("count", "length", "seed", "starts", "stride", "within"),
        *("split", "part", "split_by", "split_seed"),
    ),
    "What of a row": ("members", "columns", "as_dtype"),
    "The source": ("dtype", "row_shape", "dataset", "axis", "create.seed", "outside_files"),
    "How it is stored": ("shard_rows", "chunk_rows", "compress", "create.length"),
    "What is compared": ("subset", "verify.seed", "manifest", "write_manifest"),
    "What is timed": ("scenario", "rows", "rounds", "cold", "limit", "plot"),
    "Where to": ("out", "order", "apply_name", "dry_run", "resume", "overwrite"),
    "With what care": ("memory", "check_reads", "missing_chunks"),
    "On which cluster": ("cluster", "scheduler_address", "scheduler_file", "workers", "threads", "insecure", "report"),
    "What is said": ("as_json", "progress", "quiet", "verbose", "debug"),
}
"""Parameters by the heading that they stand under; VERB.NAME: so for that verb alone."""
_OTHERS = "Other options"
_COMPLETE = "_PIPELINE_COMPLETE"


class Verb(click.Command):
    """A verb whose options stand in sections, each where a reader looks for it.

    Parameters
    ----------
    examples
        Command lines.
    """

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = examples

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the verb does, and examples."""
        super().format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those under one heading together."""
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        headings = {name: heading for heading, names in _SECTIONS.items() for name in names}
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in _SECTIONS}
        for each in sorted(options, key=lambda option: self._rank(option, list(headings))):
            heading = headings.get(f"{self.name}.{each.name}") or headings.get(str(each.name), _OTHERS)
            if each is self.get_help_option(ctx):
                heading = list(_SECTIONS)[-1]
            if (record := each.get_help_record(ctx)) is not None:
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def _rank(self, option: click.Option, names: list[str]) -> int:
        found = [names.index(name) for name in (f"{self.name}.{option.name}", str(option.name)) if name in names]
        return found[0] if found else len(names)


class Verbs(click.Group):
    """The verbs, in the order in which a user meets them."""

    command_class = Verb

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Give the names as they were added."""
        del ctx
        return list(self.commands)


def complete_files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let a shell complete the names of files and folders."""
    del context, parameter
    return [CompletionItem(incomplete, type="file")]


def answer_shell(cli: click.Command) -> None:
    """Give a shell what it asks for when it completes a command line, and exit; do nothing where none asks."""
    if instruction := os.environ.get(_COMPLETE):
        sys.exit(shell_complete(cli, {}, "pipeline", _COMPLETE, instruction))
