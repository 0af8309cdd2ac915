"""``fedtailor plugins``: the third-party strategies and recipes that are installed here."""

from typing import Any

from rich.console import Console

from fedtailor.cli.options import Json, show


def plugins(json: Json = False) -> None:
    """List installed plug-ins, what each adds, and the line by which a site's policy approves it. It runs none of them.

    Exit code 0 also where one is of no use; the list says why.
    """
    from fedtailor import plugins as third_party
    from fedtailor.errors import ConfigError

    rows: list[dict[str, Any]] = []
    for entry in third_party.entries():
        package = entry.dist.name if entry.dist else ""
        row: dict[str, Any] = {"name": entry.name, "module": entry.value, "package": package}
        try:
            plugin = third_party.located(entry)
            row |= {"version": plugin.version, "sha256": plugin.sha256(), "adds": plugin.adds(), "problem": None}
        except ConfigError as error:
            row |= {"version": None, "sha256": None, "adds": {}, "problem": str(error)}
        rows.append(row)
    if show({"plugins": rows}, json):
        return
    out = Console(soft_wrap=True, highlight=False, markup=False)
    for row in rows:
        if row["problem"]:
            out.print(f"{row['name']} of {row['package']} is of no use: {row['problem']}")
            continue
        added = [f"{group}={name}" for group, names in row["adds"].items() for name in names]
        out.print(
            f"{row['name']}: {row['package']} {row['version']}, module {row['module']}, adds {', '.join(added) or 'no YAML'}"
        )
    good = [row for row in rows if not row["problem"]]
    if good:
        out.print("to approve it, read its code; then, in site.yaml, and start the daemon again:\npolicy:\n  plugins:")
    for row in good:
        out.print(f'    {row["name"]}: "{row["sha256"]}"')
    if not rows:
        out.print("no plug-in is installed")
