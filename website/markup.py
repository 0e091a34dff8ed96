"""What is changed in a page's HTML: formulas, and names of fields and documents."""

import html
import re
from collections.abc import Collection, Mapping

from latex2mathml import converter

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)
_NAME = re.compile(r"(?<!<pre>)<code>([\w./]+)</code>(?!</a>)")


def formulas(text: str) -> str:
    """HTML with each formula, which arithmatex has marked, as MathML."""

    def math(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        latex = html.unescape(match[3]).strip()
        return f'<{match[1]} class="formula">{mathml(latex, display)}</{match[1]}>'

    return _FORMULA.sub(math, text)


def mathml(latex: str, display: str = "block") -> str:
    """A formula as MathML, which browsers draw by themselves.

    Args:
      latex: without dollar signs.
      display: "block" or "inline".

    Raises:
      ValueError: it has a command that is not known.
    """
    found = converter.convert(latex, display=display)
    if unknown := re.search(r"\\[a-zA-Z]+", found):
        raise ValueError(f"{latex}: unknown command {unknown[0]}")
    return found


def linked(text: str, links: Mapping[str, str], without: Collection[str] = ()) -> str:
    """HTML in which code that is one of some names leads to where it is told of.

    Args:
      text: HTML.
      links: where each name leads.
      without: names that lead nowhere on this page.
    """

    def link(match: re.Match[str]) -> str:
        name = match[1]
        if name not in links or name in without:
            return match[0]
        return f'<a class="named" href="{links[name]}">{match[0]}</a>'

    return _NAME.sub(link, text)
