"""The product behind dropout: the numbers of dropout and product, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noiseproof.experts.layers import DroppedProduct, ExpertLinear, Switch
from noiseproof.experts.mixing import Experts

RATE = 0.3


def product(given: Tensor, down: Tensor) -> Tensor:
    torch.manual_seed(1)
    found: Tensor = DroppedProduct.apply(given, down, RATE)
    return found


def test_values_and_gradients_are_those_of_dropout_and_product() -> None:
    given = torch.randn(3, 5, 7, dtype=torch.double, requires_grad=True)
    down = torch.randn(4, 7, dtype=torch.double, requires_grad=True)
    torch.manual_seed(1)
    dropped, mask = torch.native_dropout(given.detach(), RATE, True)
    assert 0 < int(mask.sum()) < mask.numel()
    assert torch.allclose(dropped, given.detach() * mask / (1 - RATE))
    assert torch.equal(product(given, down), F.linear(dropped, down.detach()))
    assert torch.autograd.gradcheck(product, (given, down))


@pytest.mark.parametrize("trained", [True, False])
def test_what_needs_no_gradient_gets_none(trained: bool) -> None:
    given = torch.randn(2, 7, requires_grad=not trained)
    down = torch.randn(4, 7, requires_grad=trained)
    product(given, down).sum().backward()
    assert (down.grad is not None) == trained and (given.grad is None) == trained


def test_under_autocast_the_product_is_half_and_gradients_are_single() -> None:
    given, down = torch.randn(2, 5, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = product(given, down)
    found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    assert given.grad is not None and given.grad.dtype == torch.float32
    assert down.grad is not None and down.grad.dtype == torch.float32


def test_a_layer_keeps_its_input_and_a_mask_and_no_second_copy() -> None:
    """Wide input, narrow rest: 4 bytes an entry for the input, 1 for the mask, little more."""
    layer = ExpertLinear(nn.Linear(512, 512).requires_grad_(False), Experts(), Switch("none"))
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    given = torch.randn(64, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer.train()(given)
    weights_together = 512 * 16 * 4  # the experts side by side, whatever the number of rows
    narrow = 64 * (4 + 4 + 4 + 16 + 16) * 4
    assert sum(kept.values()) <= 64 * 512 * 5 + weights_together + narrow
