"""Escape any text for LaTeX."""

import unicodedata

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\char36{}",  # \$ needs a font that small installations lack
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": "{`}",
    "-": "{-}",  # several in a row would become one dash
    "[": "{[}",  # at the start of a row, LaTeX would take a bracket or a star for an option
    "]": "{]}",
    "*": "{*}",
    "±": r"$\pm$",
    "−": "$-$",
    "→": r"$\rightarrow$",
    "μ": r"$\mu$",
    "σ": r"$\sigma$",
    "ρ": r"$\rho$",
    "–": "--",
    "—": "---",
    "’": "'",
    "‘": "`",
    "“": "``",
    "”": "''",
    "…": r"\ldots{}",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "đ": r"\dj{}",
    "Đ": r"\DJ{}",
    "ð": r"\dh{}",
    "Ð": r"\DH{}",
    "þ": r"\th{}",
    "Þ": r"\TH{}",
    "ı": r"\i{}",
}
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
    "\u0328": "k",
}

# Letters that LaTeX's default fonts lack.
T1_ONLY = (r"\k{", r"\dj{", r"\DJ{", r"\dh{", r"\DH{", r"\th{", r"\TH{")


def escape_latex(text: str) -> str:
    r"""Make any text safe for pdflatex, in pure ASCII.

    Accented Latin letters become LaTeX accents; a character pdflatex has no glyph for becomes its
    code point, because an undeclared one would stop the compilation.

    >>> escape_latex("Zürich_100 %")
    'Z\\"{u}rich\\_100 \\%'
    """
    out = []
    for char in unicodedata.normalize("NFC", text):
        if char in _SPECIAL:
            out.append(_SPECIAL[char])
        elif char.isascii():
            out.append(char if char.isprintable() else " ")
        else:
            parts = unicodedata.normalize("NFD", char)
            accent = _ACCENTS.get(parts[-1]) if len(parts) == 2 else None
            if accent is not None and parts[0].isascii() and parts[0].isalpha():
                out.append(f"\\{accent}{{{parts[0]}}}")
            else:
                out.append(f"{{[}}U+{ord(char):04X}{{]}}")
    return "".join(out)
