"""What is wrong with the rows of a comparison: the one thing that its tests assert on."""

from collections.abc import Iterable

from ccm.paper.verdicts import Row


def complaints(rows: Iterable[Row]) -> list[str]:
    """Say what is wrong: values that differ, and artefacts that should differ but agree."""
    return [
        str(row) + (f"; but it is an artefact (defect {row.defect})" if row.must_differ else "")
        for row in rows
        if row.verdict == "differs" or (row.must_differ and row.verdict == "agrees, though an artefact")
    ]
