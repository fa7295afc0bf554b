"""How good transcripts are: error rates, word times, tables and reports. Texts in, numbers out: no model, no jax."""

from whisper_nnx.evaluation.error_rates import Counts, ErrorRates, compare, error_rates
from whisper_nnx.evaluation.normalizers import NORMALIZERS, normalize, require_packages, split
from whisper_nnx.evaluation.page import to_html
from whisper_nnx.evaluation.results import Evaluation, RowResult, Scores
from whisper_nnx.evaluation.tables import to_table
from whisper_nnx.evaluation.times import TimedWord, TimeErrors, time_errors

__all__ = [
    "NORMALIZERS",
    "Counts",
    "ErrorRates",
    "Evaluation",
    "RowResult",
    "Scores",
    "TimeErrors",
    "TimedWord",
    "compare",
    "error_rates",
    "normalize",
    "require_packages",
    "split",
    "time_errors",
    "to_html",
    "to_table",
]
