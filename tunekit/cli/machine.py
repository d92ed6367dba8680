"""The command doctor."""

from __future__ import annotations

import typer

from tunekit.cli import screen
from tunekit.cli.options import AsJson


def doctor(as_json: AsJson = False) -> None:
    """What is installed, which devices and providers answer, what is missing and how to install it."""
    from tunekit.doctor import examine
    from tunekit.units import format_bytes

    found = examine()
    incomplete = any(item["needed"] for item in found["missing"])
    if as_json:
        screen.print_json(found)
        raise typer.Exit(1 if incomplete else 0)
    from rich.text import Text

    def versions(packages: dict[str, str | None], style: str) -> Text:
        parts = [f"{name} {number or 'missing'}" for name, number in packages.items()]
        return Text(", ".join(parts), "" if all(packages.values()) else style)

    console = screen.console()
    free = format_bytes(found["disk_free_bytes"])
    print(f"tunekit {found['version']}, Python {found['python']}, {free} free here")
    screen.heading(console, "packages")
    rows: list[tuple[str | Text, ...]] = [("core", versions(found["packages"], "red"))]
    rows += [(extra, versions(packages, "yellow")) for extra, packages in found["extras"].items()]
    screen.show_table(console, ("for", "version"), rows, words=True)
    screen.heading(console, "devices")
    rows = []
    for device in found["devices"]:
        memory = f"{format_bytes(device['free_bytes'])} of {format_bytes(device['total_bytes'])} free"
        rows.append((device["device"], memory, "yes" if device["bf16"] else "no", device["title"]))
    screen.show_table(console, ("device", "memory", "bf16", "what"), rows, words=True)
    screen.heading(console, "providers")
    rows = [
        (package, Text(answer, "yellow") if isinstance(answer, str) else ", ".join(answer))
        for package, answer in found["providers"].items()
    ]
    screen.show_table(console, ("package", "answers"), rows, words=True)
    screen.heading(console, "bundled")
    console.print(" " + (", ".join(found["bundled"]) or "nothing"))
    if found["missing"]:
        screen.heading(console, "missing")
        for item in found["missing"]:  # a line to copy must not be folded into a column
            console.print(Text(f" {item['what']}", "red" if item["needed"] else "yellow"))
            print(f"   {item['install']}")
    else:
        console.print("\nnothing is missing", style="green")
    raise typer.Exit(1 if incomplete else 0)
