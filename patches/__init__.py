"""Patches: importing a module of this package applies it to unmodified training scripts.

    import channel_metrics.patches.hf_trainer     # after: pip install channel_metrics
    import patches.hf_trainer                     # the same module, in the root of a checkout

Each module offers `apply`, `revert` and `is_applied`; applying twice patches once, and a version
that lacks what a patch needs is refused with `UnsupportedVersionError`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

__all__ = ["announce", "hide_from_imports"]

_NAME = "channel_metrics.patches"
_SHORT_NAME = "patches"


def announce(message: str) -> None:
    """One line that says what was patched, from rank 0; to stderr where logging hides it."""
    if os.environ.get("RANK", "0") != "0":
        return
    logger = logging.getLogger("channel_metrics")
    if logger.isEnabledFor(logging.INFO):
        logger.info(message)
    else:
        print(message, file=sys.stderr)


def hide_from_imports(folder: str) -> None:
    """Modules in `folder` are no top-level modules, even where the folder is on `sys.path`."""
    if not any(isinstance(f, _Hidden) and f.folder == folder for f in sys.meta_path):
        sys.meta_path.insert(0, _Hidden(folder))


class _Hidden(importlib.abc.MetaPathFinder):
    """Finds the modules that one folder on `sys.path` would hide."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if path is not None or not os.path.exists(os.path.join(self.folder, f"{fullname}.py")):
            return None
        rest = [entry for entry in sys.path if os.path.abspath(entry) != self.folder]
        if len(rest) == len(sys.path):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, rest, target)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return spec


class _Forward(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """`patches.x` is `channel_metrics.patches.x`: one module object under two names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{_SHORT_NAME}."):
            return None
        name = f"channel_metrics.{fullname}"
        if importlib.util.find_spec(name) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"channel_metrics.{spec.name}")
        # The import system replaces __spec__ after this; exec_module puts the true one back.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        alias = module.__spec__
        assert alias is not None
        module.__spec__ = alias.loader_state


def _forward_to_package() -> None:
    """Make the name `patches` stand for `channel_metrics.patches`."""
    try:
        package = importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            raise
        package = _load_from_here()
    sys.meta_path.insert(0, _Forward())
    sys.modules[_SHORT_NAME] = package


def _load_from_here() -> ModuleType:
    # A checkout that is not installed has no folder channel_metrics/patches: this one is it.
    spec = importlib.util.spec_from_file_location(
        _NAME, __file__, submodule_search_locations=[os.path.dirname(__file__)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = package
    spec.loader.exec_module(package)
    setattr(importlib.import_module("channel_metrics"), _SHORT_NAME, package)
    return package


if __name__ == _SHORT_NAME:
    _forward_to_package()
