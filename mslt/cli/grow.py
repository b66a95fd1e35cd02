"""`mslt grow`: layer surgery on a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from mslt.errors import MsltError


def grow(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Folder of a Hugging Face checkpoint, of a run's stage or a run.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    sources: Annotated[
        str | None,
        typer.Option(
            help="Which layer of IN each layer of OUT copies, from 0, ends included: 0-5,0-5 doubles 6 layers; "
            "`random` makes a new one.",
            show_default=False,
        ),
    ] = None,
    copy: Annotated[
        int | None, typer.Option(min=0, help="This layer becomes those of --to, too; all others stay.")
    ] = None,
    to: Annotated[str | None, typer.Option(help="With --copy: like 10,11.")] = None,
    drop_top: Annotated[int | None, typer.Option(help="Leave out so many layers from the top.")] = None,
    keep: Annotated[str | None, typer.Option(help="Leave out all layers but these, like 0,2,4 or 0-9.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random layers.")] = 0,
) -> None:
    """Copy, stack, drop or add layers: one index map from the layers of OUT to those of IN. Layers count from 0."""
    forms = {"--sources": sources, "--copy": copy, "--drop-top": drop_top, "--keep": keep}
    given = [name for name, value in forms.items() if value is not None]
    if len(given) != 1:
        raise MsltError(f"mslt grow: give one of {', '.join(forms)}, and not {' and '.join(given) or 'none'}")
    if (copy is None) != (to is None):
        raise MsltError("mslt grow: --copy and --to go together, like --copy 9 --to 10,11")

    from transformers.utils import logging

    from mslt.growth import copied_upwards, kept_layers, parse_sources, without_top
    from mslt.models.checkpoint import grow_folder
    from mslt.models.factory import read_config
    from mslt.rundir import find_model

    source, _ = find_model(source)
    logging.disable_progress_bar()
    depth = read_config(source).num_hidden_layers
    if copy is not None and to is not None:
        chosen = copied_upwards(depth, copy, parse_sources(to))
    elif drop_top is not None:
        chosen = without_top(depth, drop_top)
    else:
        chosen = kept_layers(depth, parse_sources(keep)) if keep is not None else parse_sources(sources or "")
    depth_before, depth_after = grow_folder(source, out, chosen, seed)
    typer.echo(f"{out}: {depth_after} layers from the {depth_before} of {source}")
