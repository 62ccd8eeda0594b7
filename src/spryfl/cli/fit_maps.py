"""`spry fit-maps`: backward maps for guided tangents, fitted once on public text."""

from pathlib import Path
from typing import Annotated

import typer

from spryfl.errors import SpryError


def fit_maps(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="builtin:NAME, a hub id, or a local folder.")],
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="Public text: Parquet, CSV, JSONL, or .txt with a text a line.")
    ],
    prompt: Annotated[
        str,
        typer.Option(
            help="The task's prompt, such as 'Review: {text}\\nSentiment:', with the task's columns; \\n is a new line."
        ),
    ],
    word: Annotated[list[str], typer.Option(help="A label word, such as ' positive'; give it for every class.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the maps go.")] = Path("maps.safetensors"),
    column: Annotated[
        list[str] | None,
        typer.Option(help="Of the text, for a field of the prompt each, in order; those of the same names by default."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Longer texts are truncated.")] = 64,
    texts: Annotated[int, typer.Option(min=2, help="As many at most.")] = 512,
    horizon: Annotated[int, typer.Option(min=0, help="guide.horizon of the runs they serve.")] = 0,
    rank: Annotated[int, typer.Option(min=1, help="Directions of the last gradient they carry, at most.")] = 32,
    across: Annotated[bool, typer.Option(help="Model the gradient on other tokens too.")] = True,
    quantization: Annotated[str, typer.Option(help="model.quantization of the runs they serve.")] = "none",
    seed: Annotated[int, typer.Option(min=0, help="Of the random labels and the choice of texts.")] = 0,
) -> None:
    """Fit, for every layer, how the loss's gradient at the last hidden state comes down to it.

    On public text in the task's own prompt, with random labels: no private data and no labels of the task. Use the
    file with guide.guess = 'maps', guide.maps = FILE.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from spryfl.config import parse_config

    template = prompt.replace("\\n", "\n")
    fields = _fields(template)
    if column and len(column) != len(fields):
        raise SpryError(
            f"--column: {len(column)} given, but the prompt's fields are {fields}: give one for each, in order"
        )
    config = parse_config(
        {
            "seed": seed,
            "model": {"name": model, "quantization": quantization},
            "task": {"kind": "prompted", "template": template, "label_words": word},
            "data": {"text_columns": fields, "max_tokens": tokens},
            "method": {"name": "spry_guided"},
            "guide": {
                "guess": "maps",
                "text": str(text),
                "text_columns": column or None,  # of the same names
                "num_texts": texts,
                "horizon": horizon,
                "rank": rank,
                "across": across,
            },
        }
    )
    if out.is_dir():
        raise SpryError(f"--out {out} is a folder: name a file in it, such as {out / 'maps.safetensors'}")
    out.parent.mkdir(parents=True, exist_ok=True)  # now, as a fit takes minutes
    # After the arguments are known to be good: this imports torch.
    from spryfl.map_fitting import fit_for_prompt

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = progress.add_task("fitting", total=None)
        fitted = fit_for_prompt(config, out, lambda done, total: progress.update(shown, completed=done, total=total))
    print("layer  cosine with the true gradient on held-out text")
    for place, cosine in fitted.cosines.items():
        print(f"{place:5d}  {cosine:6.3f}")
    print(
        f"{out}: rank {fitted.rank}, {fitted.layer_bytes / 1e3:,.0f} kB a layer. "
        f"Use them with guide.guess = 'maps', guide.maps = '{out}'"
    )


def _fields(template: str) -> list[str]:
    """A prompt's fields, each once; "text" where it has none or is no prompt, of which the configuration tells."""
    from spryfl.config import TaskConfig

    try:
        pieces = TaskConfig.model_construct(template=template).pieces
    except ValueError:
        return ["text"]
    return list(dict.fromkeys(field for _, field in pieces if field)) or ["text"]
