"""Commands about configs: ls, show, explain, check, cp."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tunekit.cli import screen
from tunekit.cli.options import AsJson, Config, Overrides, Runs
from tunekit.errors import TunekitError
from tunekit.quiet import report_warnings


def ls(runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """What there is: configs, sweeps, recipes, families, passes, bundled models and pictures, runs."""
    from tunekit import workspace

    found = workspace.inventory()
    states = workspace.runs(runs)
    if as_json:
        known = [{key: value for key, value in asdict(state).items() if value != ""} for state in states]
        screen.print_json({**found, "runs": known})
        return
    console = screen.console()
    for title, entries in found.items():
        screen.heading(console, title)
        rows = [(name, about.removesuffix(".")) for name, about in entries.items()]
        screen.show_table(console, ("name", "what"), rows, words=True)
    screen.heading(console, f"runs in {runs}")
    if states:
        found_runs = [(state.run, state.state, state.final or "-") for state in states]
        screen.show_table(console, ("folder", "state", "final"), found_runs)
    else:
        console.print(" none")
    for state in states:
        if state.problem:
            screen.say(console, f" {state.problem}", "red")


def show(
    config: Config,
    overrides: Overrides = None,
    as_json: AsJson = False,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of this config")] = False,
) -> None:
    """Print a config as it will be used: with what it extends, the overrides and all defaults."""
    from tunekit.config import dump_yaml, load, recipe_of

    if schema:
        from tunekit.explain import schema as json_schema

        screen.print_json(json_schema(recipe_of(config, overrides or ())))
        return
    loaded = load(config, overrides or ())
    report_warnings(loaded.warnings)
    if as_json:
        screen.print_json(loaded.config.model_dump(mode="json"))
    else:
        print(dump_yaml(loaded.config, ascii_only=not screen.is_utf8()), end="")


def explain(
    name: Annotated[str, typer.Argument(help="key (train.lr, lr, prune.ratio), section, pass or optimizer")],
    as_json: AsJson = False,
) -> None:
    """Say what a key, a pass or an optimizer is, and what it takes. Words of other trainers are known."""
    from tunekit.explain import explain as explained

    found = explained(name)
    if as_json:
        screen.print_json([asdict(item) for item in found])
        return
    console = screen.console()
    for item in found:
        screen.heading(console, f"{item.name} ({item.kind})")
        for paragraph in item.about.split("\n\n"):
            screen.say(console, " ".join(paragraph.split()))
        for fact, text in item.facts.items():
            screen.say(console, f"{fact}: {text}", "dim")
        if item.keys:
            rows = [(key, f"{about} ({takes})" if about else takes) for key, takes, about in item.keys]
            screen.show_table(console, ("key", "what"), rows, words=True)


def check(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Look at a config, its passes and every picture, and list all that is wrong. Starts nothing."""
    from tunekit import workspace
    from tunekit.config import load
    from tunekit.progress import console

    if as_json:
        examination = workspace.check(config, overrides or ())
        screen.print_json(examination.as_json())
        raise typer.Exit(2 if examination.problems else 0)
    loaded = load(config, overrides or ())
    report_warnings(loaded.warnings)
    found = workspace.examine(loaded, console())
    out = screen.console()
    out.print(str(loaded.path), style="bold")
    rows = [(name, str(fact)) for name, fact in found.facts.items()]
    screen.show_table(out, ("what", "found"), rows, words=True)
    for line in found.notes:
        out.print(line, style="yellow", soft_wrap=True)
    if found.errors:
        raise TunekitError("\n".join(map(str, found.errors)))
    out.print("all is well", style="green")


def cp(
    name: Annotated[str, typer.Argument(help="config, recipe or sweep, as tunekit ls shows it")],
    dest: Annotated[Path, typer.Argument(help="file or folder to copy to")],
    force: Annotated[bool, typer.Option("--force", help="overwrite")] = False,
) -> None:
    """Copy a ready-made config, recipe or sweep, to make it your own."""
    from tunekit import workspace

    print(workspace.copy(name, dest, force=force))
