"""Tables on the terminal."""


def print_table(header: list[str], rows: list[list[str]], width: int = 120, title: str | None = None) -> None:
    """The first column left, the others right; `width` characters at least."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for index, heading in enumerate(header):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, width)
    console.print(table)
