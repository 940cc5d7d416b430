"""The sketch's one kernel for CUDA gives what its matrix products give."""

import pytest
import torch

from hvdlocal.averaging.sketch import GradientSketch
from hvdlocal.models import build_model

RESNET = [p.numel() for p in build_model("resnet18_cifar", 10, (32, 32, 3)).parameters()]


@pytest.mark.parametrize(
    ("numels", "size"),
    [([5000, 33, 1024, 640], 64), ([30, 7, 64], 4096), ([70, 3, 129], 32), ([9000, 4000, 12], 333), (RESNET, 16384)],
)
def test_the_kernel_is_the_matrix_products(device, numels, size):
    torch.manual_seed(0)
    sketch = GradientSketch(numels, size, device)
    if device.type == "cpu":
        assert sketch._kernel is None
        pytest.skip("the kernel is for CUDA")
    if sketch._kernel is None:
        pytest.skip("this torch comes without Triton")
    for _ in range(2):  # other tensors, at other addresses
        # One element is left out at the beginning, so that tensors begin anywhere.
        gradients = [torch.randn(numel + 1, device=device)[1:] for numel in numels]
        fused, products = (torch.full((sketch.size,), float("nan"), device=device) for _ in range(2))
        sketch.project(gradients, fused)
        kernel, sketch._kernel = sketch._kernel, None
        sketch.project(gradients, products)
        sketch._kernel = kernel
        torch.testing.assert_close(fused, products, rtol=1e-4, atol=1e-4 * float(products.abs().max()))
        again = torch.empty_like(fused)
        sketch.project(gradients, again)
        assert torch.equal(again, fused), "the same bits each time"
