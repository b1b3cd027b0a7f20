"""Import of libraries that only some commands need."""

import importlib
from types import ModuleType

from segtrain.errors import UsageError


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which `pip install 'segtrain[extra]'` installs.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"{module} is not installed", f"run: pip install 'segtrain[{extra}]'"
        ) from None
