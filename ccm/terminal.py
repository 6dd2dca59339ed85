"""What the command line prints: plain text for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ccm.errors import BadInput
from ccm.knowledge import SOURCES
from ccm.models import MODELS, spec_for
from ccm.weights import check_weights, weight_files


def share(r: Mapping[str, Any]) -> str:
    """`12.3 % (37/300; 8.8-16.6)`: percent, count, denominator and 95 % interval."""
    if r["percent"] is None:
        return "- (0/0)"
    return f"{r['percent']:.1f} % ({r['count']}/{r['total']}; {r['low']:.1f}-{r['high']:.1f})"


def summary(scores: Mapping[str, Any]) -> str:
    """Summarise a run's scores: sources before, then one block per ablation value."""
    lines = [
        f"{scores['model']}, protocol {scores['protocol']}, {scores['n_prompts']} probing prompts",
        f"parametric recall {share(scores['parametric_recall'])}",
        "sources before ablation: " + ", ".join(f"{s} {share(scores['sources'][s])}" for s in SOURCES),
        "",
        f"{'ablation value':28s}{'GTS of the entropy set':34s}{'GTS of controls (max)':24s}"
        f"{'Q':>7s}{'p':>9s}  CR(CK) (controls' max)",
    ]
    for name, value in scores["ablations"].items():
        own, controls = value["entropy"], value["controls"]
        ck = own["conversion_ratios"]["CK"]
        lines.append(
            f"{name:28s}{share(own['gts']):34s}"
            f"{_range(controls['gts']):24s}{_digits(own['q_value'], 1):>7s}"
            f"{_digits(own['permutation_p'], 4):>9s}  {share(ck)} "
            f"({_digits(controls['conversion_ratios']['CK']['high'], 1)} %)"
        )
    lines.append("\nIn brackets: count/denominator; exact 95 % interval in percent.")
    return "\n".join(lines)


def _range(control: Mapping[str, Any]) -> str:
    mean, high = control["mean"], control["high"]
    return "-" if mean is None else f"{mean:.2f} % ({high:.2f} %)"


def _digits(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def models_table(paths: Mapping[str, Path]) -> str:
    """List each known model: its weights here or not, where, and how big."""
    lines = [f"{'model':26s}{'weights':10s}{'size':>10s}  where"]
    for name in [*MODELS, *(n for n in paths if n not in MODELS)]:
        spec = spec_for(name, paths)
        files, state = weight_files(spec), "found"
        where = str(files[0].parent) if files else f"hub: {spec.hub_id}"
        try:
            check_weights(spec)
        except BadInput as error:
            state, where = "unusable", str(error)
        if not files:
            state = "missing"
            where += " (gated: needs access and HF_TOKEN)" if spec.gated else ""
        size = sum(f.stat().st_size for f in files if f.is_file())
        lines.append(f"{name:26s}{state:10s}{f'{size / 1e6:.1f} MB' if files else '-':>10s}  {where}")
    return "\n".join(lines)
