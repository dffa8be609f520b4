"""The pages of the documentation: their code, and running it."""

import re
import textwrap

from tests import ROOT


def blocks(page, language):
    """The code blocks of a page in one language, also those in lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


def run_blocks(page, namespace=None):
    """Execute the Python blocks of a page, one after another, in one namespace; return it."""
    namespace = {} if namespace is None else namespace
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)
    return namespace
