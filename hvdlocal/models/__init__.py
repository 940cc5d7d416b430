"""Models by name: some of torchvision's, the papers' CIFAR networks, and a small one for 8×8 digits."""

from hvdlocal.models.registry import MODELS, build_model, check_images

__all__ = ["MODELS", "build_model", "check_images"]
