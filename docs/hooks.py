"""For mkdocs: below each class of options, a table of them from the fields that describe them."""

import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from whisper_nnx.cli.options import OPTIONS
from whisper_nnx.runtime.options import explanation, options_of

_FLAGS = {flag.option: flag.name for flags in OPTIONS.values() for flag in flags}


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"^::: ([\w.]+Options)$", lambda match: f"{match[0]}\n\n{table(match[1])}", markdown, flags=re.M)


def table(name: str) -> str:
    rows = ["| option | default | the command's | |", "|---|---|---|---|"]
    for one in options_of(pkgutil.resolve_name(name)).values():
        flag = f"`{_FLAGS[one]}`" if one in _FLAGS else ""
        if flag and one.on_command not in (None, one.default) and one.command_default != one.default:
            flag += f", `{one.command_default}`"
        cells = [f"`{one.name}`", f"`{one.default!r}`", flag, explanation(one)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)
