"""Formulas as MathML, which browsers show by themselves: no script, nothing from the network."""

from __future__ import annotations

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

logger = logging.getLogger(__name__)


def to_mathml(node: nodes.Element, text: str, display: str) -> str:
    """MathML of LaTeX; what the converter does not know is a warning, not a line of source."""
    mathml = convert(text, display=display)
    if "\\" in mathml or "<mi>&</mi>" in mathml:
        logger.warning("not shown as MathML: %s", text, location=node)
    return mathml


def visit_inline(self, node: nodes.math) -> None:
    """Write a formula within a line."""
    self.body.append(to_mathml(node, node.astext(), "inline"))
    raise nodes.SkipNode


def visit_block(self, node: nodes.math_block) -> None:
    """Write a formula of its own, with its number if it has one."""
    text = node.astext().strip()
    if "\\\\" in text and "\\begin{" not in text.split("\\\\")[0]:  # several lines
        text = rf"\begin{{align*}}{text}\end{{align*}}"
    self.body.append(self.starttag(node, "div", CLASS="math-block"))
    if node["number"]:
        number = get_node_equation_number(self, node)
        self.body.append(f'<span class="eqno">({number})</span>')
    self.body.append(to_mathml(node, text, "block") + "</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer; ``html_math_renderer = "mathml"`` chooses it."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
