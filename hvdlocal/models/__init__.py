"""Models by name: some of torchvision's, the papers' CIFAR networks, a small one for 8×8 digits, and GPT-2's transformer."""

from hvdlocal.models.gpt import GPT, gpt
from hvdlocal.models.registry import MODELS, build_model, check_images

__all__ = ["GPT", "MODELS", "build_model", "check_images", "gpt"]
