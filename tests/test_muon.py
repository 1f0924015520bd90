"""The orthogonalised update."""

import pytest
import torch

from training import muon
from training.muon import Muon, orthogonalize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (8, 8)])
def test_orthogonalizing_moves_singular_values_near_one_and_keeps_directions(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrix, dtype=dtype)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert values.max() / values.min() > 1.5
    after = torch.linalg.svdvals(result)
    assert after.min() > 0.6
    assert after.max() < 1.3
    # The nearest semi-orthogonal matrix is U V^T; the iteration keeps U and V.
    assert torch.nn.functional.cosine_similarity(result.flatten(), (left @ right).flatten(), dim=0) > 0.97


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_uses_the_dtype_chosen_for_the_device(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "choose_dtype", lambda _device: dtype)
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1)))
    weight.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    scaled, update = weight.detach() * (8**0.5 / weight.detach().norm()), (1 + 0.6) * weight.grad.flatten(1)
    Muon([weight], learning_rate=1.0).step()
    turns = {each: orthogonalize(update, dtype=each).view_as(weight) for each in (torch.bfloat16, torch.float32)}
    assert not torch.allclose(turns[torch.bfloat16], turns[torch.float32], atol=1e-4)
    torch.testing.assert_close(scaled - weight.detach(), turns.pop(dtype), atol=1e-6, rtol=1e-5)


def test_a_step_keeps_the_norm_and_goes_downhill() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1)))
    target = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    optimizer = Muon([weight], learning_rate=0.02)
    similarities = []
    for _ in range(120):
        loss = -torch.nn.functional.cosine_similarity(weight.flatten(), target.flatten(), dim=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        similarities.append(-loss.item())
    assert similarities[-1] > 0.9 > similarities[0]
    assert weight.norm().item() == pytest.approx(8**0.5, rel=0.1)
