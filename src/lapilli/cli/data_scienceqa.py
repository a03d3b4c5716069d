"""`lapilli data convert-scienceqa`: ScienceQA's problems as conversations, in every form of the original."""

from __future__ import annotations

from typing import Annotated

import typer


def convert_scienceqa(
    base: Annotated[str, typer.Argument(metavar="DIR", help="Holds problems.json and pid_splits.json.")],
    split: Annotated[str, typer.Option(help="A split of pid_splits.json: train, val, test, minitest ...")] = "train",
    form: Annotated[
        str, typer.Option(help="INPUT-OUTPUT: CQM, QCM, QCML ... - A, AL, AE, ALE, AEL, LA, EA, LEA, ELA, LEPA.")
    ] = "QCM-LEPA",
    lines: Annotated[
        bool, typer.Option("--lines", help="Lines of instruction and output instead of conversations.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Default: the original's name for it, in DIR.")
    ] = None,
) -> None:
    """Write a split of ScienceQA to train on or to ask, to the byte what the original's convert_sqa_to_llava.py writes.

    Pictures are named by problem, `ID/image.png`, relative to the folder of the split's pictures.
    """
    from lapilli.evaluate.scienceqa_forms import convert

    typer.echo(f"wrote {convert(base, split, form, 'jsonl' if lines else 'llava', out)}")
