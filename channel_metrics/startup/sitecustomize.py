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
from _thread import _local

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["PATCHES", "PATCHES_VARIABLE", "PatchFinder", "finder"]

PATCHES_VARIABLE = "CHANNEL_METRICS_PATCHES"

_HF = {"transformers.trainer": "channel_metrics.trainers.hf.patch"}

# {name that `--patch` takes: {a module: the module to `apply` once that one is imported}}
PATCHES = {
    "hf_trainer": _HF,
    "llamafactory": {
        **_HF,
        "llamafactory.data.loader": "channel_metrics.trainers.llamafactory.patch",
    },
    "megatron": {"megatron.core": "channel_metrics.trainers.megatron.patch"},
    "megatron_bridge": dict.fromkeys(
        ("megatron.bridge.training.pretrain", "megatron.bridge.data.packing.offline"),
        "channel_metrics.trainers.megatron_bridge.patch",
    ),
    "ms_swift": dict.fromkeys(
        ("swift.dataset", "swift.pipelines", "swift.trainers"),
        "channel_metrics.trainers.swift.patch",
    ),
    "trl": {**_HF, "trl.trainer.sft_trainer": "channel_metrics.trainers.trl.patch"},
}


class _Imports(_local):
    """The imports of one thread. depth: how many have begun. ready: the modules to apply."""

    def __init__(self) -> None:
        self.depth = 0
        self.ready = []  # type: list[str]


class PatchFinder:
    """Finds modules as the other finders do, and applies patches after some of them.

    While a package imports its own modules, some of them are not complete. So a patch is applied
    when the outermost import has ended, of all packages that are waited for and of our own.
    """

    def __init__(self) -> None:
        # {module that is waited for: module to apply}
        self.waiting = {}  # type: dict[str, str]
        # The packages of these modules. Threads may import at the same time, so it is replaced.
        self.packages = frozenset()  # type: frozenset[str]
        # A thread must not apply what another one is still importing.
        self.imports = _Imports()

    def watch(self, names: "Any") -> None:
        """Apply these patches as soon as their modules are imported, or now if they are."""
        for name in names:
            self.waiting.update(PATCHES.get(name, {}))
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        for module in [name for name in self.waiting if name in sys.modules]:
            self.imports.ready.append(self.waiting.pop(module))
        self._update_packages()
        self._apply()

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        if name.partition(".")[0] not in self.packages or self not in sys.meta_path:
            return None
        for other in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(other, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec, self)
                return spec
        return None

    def execute(self, loader: "Any", module: "Any") -> None:
        """Execute a module; after the outermost one, apply what is ready."""
        imports, name = self.imports, module.__name__
        imports.depth += 1
        try:
            loader.exec_module(module)
        finally:
            imports.depth -= 1
        if name in self.waiting:
            imports.ready.append(self.waiting.pop(name))
            self._update_packages()
        if imports.ready and not imports.depth:
            parent, _, last = name.rpartition(".")
            if parent:
                # The import system does this afterwards; the patch may need it now.
                setattr(sys.modules[parent], last, sys.modules[name])
            self._apply()

    def _update_packages(self) -> None:
        names = [*self.waiting, "channel_metrics"] if self.waiting else []
        self.packages = frozenset(name.partition(".")[0] for name in names)

    def _apply(self) -> None:
        while self.imports.ready:
            _apply_patch(self.imports.ready.pop(0))


class _Loader:
    """The loader of a module, until it executes the module."""

    def __init__(self, spec: "Any", finder: PatchFinder) -> None:
        self._spec, self._loader, self._finder = spec, spec.loader, finder

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def exec_module(self, module: "Any") -> None:
        self._spec.loader = module.__loader__ = self._loader
        self._finder.execute(self._loader, module)


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
    names = os.environ.get(PATCHES_VARIABLE)
    # Any Python may be here.
    if names and sys.version_info >= (3, 10):
        finder.watch(names.split(","))


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
