"""The products that exist for a CPU are the ordinary ones."""

import pytest
import torch

from lab.models import gpt


@pytest.mark.parametrize("rows", [1, 2, 64, 65])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_for_few_rows_is_the_ordinary_one(rows, bias):
    torch.manual_seed(0)
    layer, x = gpt.Linear(6, 5, bias=bias).double(), torch.randn(rows, 1, 6, dtype=torch.float64)
    expected = x @ layer.weight.t() + (layer.bias if bias else 0)
    with torch.no_grad():
        got = layer(x)
    torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-14)  # another order of additions
    assert got.shape == (rows, 1, 5)
