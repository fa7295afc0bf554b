"""A batch whose windows are decoded by a script."""

from collections.abc import Callable
from typing import Any

from whisper_nnx.transcription.row_decoder import RowDecoder


class ScriptedRows(RowDecoder):
    """Decodes all rows in each step: `script(model, encoded, options, seeds, meanwhile)` returns their results."""

    script: Callable[..., Any]

    def decode(self, wanted, meanwhile=lambda: None):
        rows = range(self.size)
        options = [wanted[i].options if i in wanted else None for i in rows]
        seeds = [wanted[i].seed if i in wanted else 0 for i in rows]
        results = self.script(self._model, self.windows([*rows]), options, seeds, meanwhile)
        return {i: result for i, result in enumerate(results) if i in wanted}


def scripted(script: Callable[..., Any]) -> Callable[..., RowDecoder]:
    """For a Batch's `make_decoder`."""
    return type("Scripted", (ScriptedRows,), {"script": staticmethod(script)})
