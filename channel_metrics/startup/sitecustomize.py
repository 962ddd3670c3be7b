"""Applies the patches of `channel-metrics run` in every Python process below it.

`channel-metrics run` puts the folder of this file on PYTHONPATH, and the names of the patches into
CHANNEL_METRICS_PATCHES. Python imports a module of this name when it starts. Nothing is patched
then: a patch is applied when the process has imported a trainer that it is for. Until then, neither
torch nor channel_metrics is imported.

Any Python may find this file, so it does without channel_metrics and without new syntax. Afterwards
it calls the `sitecustomize` that it hides.
"""

import os
import sys
from _thread import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["PATCHES", "PATCHES_VARIABLE", "finder"]

PATCHES_VARIABLE = "CHANNEL_METRICS_PATCHES"

_HF = {"transformers.trainer": "channel_metrics.trainers.hf.patch"}

# {name that `--patch` takes: {a module: the module to `apply` once that one is imported}}
PATCHES = {
    "hf_trainer": _HF,
    "megatron": {"megatron.core": "channel_metrics.trainers.megatron.patch"},
    "ms_swift": dict.fromkeys(
        ("swift.dataset", "swift.pipelines", "swift.trainers"),
        "channel_metrics.trainers.swift.patch",
    ),
    "trl": {**_HF, "trl.trainer.sft_trainer": "channel_metrics.trainers.trl.patch"},
}


class PatchFinder:
    """Finds modules as the other finders do, and applies patches after some of them.

    While a package imports its own modules, some of them are not complete. So a patch is applied
    when the outermost import of the package has ended.
    """

    def __init__(self) -> None:
        # {module that is waited for: module to apply}
        self.waiting = {}  # type: dict[str, str]
        # {(thread, package): modules that are being imported now, one inside the other}
        self.depth = {}  # type: dict[tuple[int, str], int]

    def watch(self, names: "Any") -> None:
        """Apply these patches as soon as their modules are imported, or now if they are."""
        for name in names:
            self.waiting.update(PATCHES.get(name, {}))
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        for package in self._packages():
            self._apply(package)

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        package = name.partition(".")[0]
        if package not in self._packages() or self not in sys.meta_path:
            return None
        for other in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(other, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec, self, package)
                return spec
        return None

    def execute(self, loader: "Any", module: "Any", package: str) -> None:
        """Execute a module of `package`; after the outermost one, apply its patches."""
        place = get_ident(), package
        self.depth[place] = self.depth.get(place, 0) + 1
        try:
            loader.exec_module(module)
        finally:
            self.depth[place] -= 1
        if not self.depth[place]:
            self._apply(package)

    def _packages(self) -> "Any":
        return {name.partition(".")[0] for name in self.waiting}

    def _apply(self, package: str) -> None:
        for name in list(self.waiting):
            if name.partition(".")[0] == package and name in sys.modules:
                patch = self.waiting.pop(name, None)
                if patch is not None:
                    _apply_patch(patch)


class _Loader:
    """The loader of a module, until it executes the module."""

    def __init__(self, spec: "Any", finder: PatchFinder, package: str) -> None:
        self._spec, self._loader, self._finder, self._package = spec, spec.loader, finder, package

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def exec_module(self, module: "Any") -> None:
        self._spec.loader = module.__loader__ = self._loader
        self._finder.execute(self._loader, module, self._package)


def _apply_patch(name: str) -> None:
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("channel_metrics"):
            raise
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(
                f"channel metrics: {sys.executable} does not have {error.name}, so this process "
                "has no metrics.\n"
            )
        return
    from channel_metrics.run_marks import mark

    sys.modules[name].apply()
    mark("patched")


def _start() -> None:
    """What the start of a Python process below `channel-metrics run` does."""
    if sys.version_info >= (3, 10):  # noqa: UP036
        finder.watch(filter(None, os.environ.get(PATCHES_VARIABLE, "").split(",")))


def _import_hidden() -> None:
    """Import the `sitecustomize` that this one hides, as Python would have done."""
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != folder]
    ours = sys.modules.pop(__name__)
    try:
        __import__(__name__)
    except ImportError as error:
        if error.name != __name__:
            raise
        sys.modules[__name__] = ours


finder = PatchFinder()
if __name__ == "sitecustomize":
    _start()
    _import_hidden()
