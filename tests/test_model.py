"""The networks: the tutorial's exactly, and ours."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from app import model


def trained_looking(name: str) -> model.Normalized:
    """Weights, batch statistics and normalisation that are not the neutral ones of a new network."""
    torch.manual_seed(0)
    network = model.build(name)
    network.mean.copy_(torch.tensor([0.49, 0.48, 0.45]))
    network.std.copy_(torch.tensor([0.25, 0.24, 0.26]))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                assert tensor is not None
                tensor.uniform_(-0.5, 0.5)
    return network.eval()


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_net_has_the_tutorials_parameters() -> None:
    net = model.build("net")
    assert sum(parameter.numel() for parameter in net.parameters()) == 62_006
    assert [(name, tuple(parameter.shape)) for name, parameter in net.named_parameters()] == [
        ("conv1.weight", (6, 3, 5, 5)),
        ("conv1.bias", (6,)),
        ("conv2.weight", (16, 6, 5, 5)),
        ("conv2.bias", (16,)),
        ("fc1.weight", (120, 400)),
        ("fc1.bias", (120,)),
        ("fc2.weight", (84, 120)),
        ("fc2.bias", (84,)),
        ("fc3.weight", (10, 84)),
        ("fc3.bias", (10,)),
    ]


@pytest.mark.parametrize("name", model.NETWORKS)
def test_uint8_and_float_pixels_agree(name: str) -> None:
    network = trained_looking(name)
    assert torch.equal(network(pixels()), network(pixels().float()))


def test_pixels_are_normalised_as_torchvision_does() -> None:
    network = trained_looking("net")
    mean, std = (tensor[:, None, None] for tensor in (network.mean, network.std))
    torch.testing.assert_close(network.normalize(pixels()), (pixels() / 255 - mean) / std)


@pytest.mark.parametrize("name", model.NETWORKS)
@pytest.mark.parametrize("num_classes", [2, 10])
def test_logits_have_a_column_per_class(name: str, num_classes: int) -> None:
    network = model.build(name, num_classes=num_classes).eval()
    assert network(pixels()).shape == (3, num_classes)
    assert network(pixels(1)).shape == (1, num_classes)


@pytest.mark.parametrize("name", model.NETWORKS)
def test_folding_changes_no_answer(name: str) -> None:
    network = trained_looking(name)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    folded = model.fold(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(pixels()), network(pixels()), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())  # a copy was folded


def test_convolutions_begin_as_the_identity_on_their_first_channels() -> None:
    convolutions = [layer for layer in model.CifarNet().groups.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 9
    for convolution in convolutions:
        x_NCHW = torch.rand(1, convolution.in_channels, 5, 5)
        torch.testing.assert_close(convolution(x_NCHW)[:, : convolution.in_channels], x_NCHW)


def test_the_first_layer_whitens_the_patches() -> None:
    smooth_NCHW = F.interpolate(torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)), scale_factor=4.0)
    pixels_NCHW = smooth_NCHW * 255
    network = model.CifarNet()
    network.set_whitening(pixels_NCHW)
    answers_CP = network.whiten(network.normalize(pixels_NCHW)).detach().transpose(0, 1).flatten(1)
    second_moments = answers_CP[:12] @ answers_CP[:12].T / answers_CP.shape[1]
    assert (second_moments - torch.diag(second_moments.diagonal())).abs().max() < 0.01
    assert second_moments.diagonal().max() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(answers_CP[12:], -answers_CP[:12])


def test_whitening_replaces_components_absent_from_all_pictures() -> None:
    grey_NCHW = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1) * 255
    network = model.CifarNet()
    network.set_whitening(grey_NCHW)
    answers_CP = network.whiten(network.normalize(grey_NCHW)).detach().transpose(0, 1).flatten(1)
    assert answers_CP.std(dim=1).min() > 0.5
    assert len(network.whiten.weight.flatten(1).unique(dim=0)) == 2 * 4  # of a patch of 2x2 pixels, and their negatives


def test_the_default_network_is_small() -> None:
    parameters = sum(parameter.numel() for parameter in model.build("cifar_net").parameters())
    assert parameters <= 2_500_000


def test_an_unknown_network_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no network 'vgg'; there are net, cifar_net, wide_cifar_net"):
        model.build("vgg")
