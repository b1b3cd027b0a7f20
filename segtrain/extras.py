"""Libraries that only some commands need, and what to type where one is missing."""

import importlib
from types import ModuleType

from segtrain.errors import UsageError


def needed(module: str, extra: str) -> ModuleType:
    """Import `module`, which `pip install 'segtrain[extra]'` brings.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"this needs {module}, which is not installed: pip install 'segtrain[{extra}]'"
        ) from None
