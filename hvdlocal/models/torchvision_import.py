"""Imports torchvision beside a torch for which its compiled operators do not load."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

_declared: list[torch.library.Library] = []  # an operator exists as long as the library object that declared it


def import_torchvision() -> ModuleType:
    """Imports torchvision even if its compiled operators do not load.

    The torchvision wheels on PyPI are CUDA builds. Beside a CPU-only torch their operators are missing, and importing torchvision
    fails because it registers meta kernels for two of them. Models and transforms use neither, so declaring the two
    is enough. A site whose package index serves the matching CPU wheel does not need this: the plain import succeeds first.

    Returns:
        The module `torchvision`.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")


def prepare_torchvision(path: str) -> None:
    """Makes torchvision importable for a model by import path that needs it: one of its own, or of timm."""
    if path.partition(".")[0].partition(":")[0] in ("torchvision", "timm") and importlib.util.find_spec("torchvision"):
        import_torchvision()
