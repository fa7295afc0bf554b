"""Checks for packages of optional extras before work that needs them starts."""

from __future__ import annotations

import importlib.util


class MissingPackageError(ImportError):
    """A package of an extra is not installed; the message, one line, says what needs it and how to install it."""


def require_packages(purpose: str, extra: str, *packages: str) -> None:
    """Raises MissingPackageError if one of the packages is missing."""
    for package in packages:
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            raise MissingPackageError(f'{purpose} needs the package {package}; pip install "whisper-nnx[{extra}]"')
