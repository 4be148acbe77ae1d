"""Making our image towers known to timm without importing timm for it.

Importing timm takes seconds, most of them in what torchvision imports, and who asks for a layer or
an export does not need it. So the towers are registered at once where timm has been imported, and
otherwise as soon as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_timm(module: str) -> None:
    """Import `module`, which registers models, now or right after timm has been imported."""
    if "timm" in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _AfterTimm(module))


class _AfterTimm(MetaPathFinder):
    """Finds timm as the other finders do, and has `module` imported after it, once."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm":
            return None
        others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:  # it may never be imported, though
            self._extend(spec.loader)
        return spec

    def _extend(self, loader: Any) -> None:
        execute = loader.exec_module

        def execute_and_register(timm: ModuleType) -> None:
            execute(timm)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(self.module)

        loader.exec_module = execute_and_register
