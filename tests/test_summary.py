"""Parameters and multiply-adds, against sums done by hand."""

import io

import pytest
import torch
from torch import nn

from app import model
from training.summary import layers, summarize


def test_the_tutorials_net_by_hand() -> None:
    rows = {row.name: row for row in layers(model.build("net"))}
    assert rows["conv1"].output_shape == (6, 28, 28)
    assert rows["conv1"].multiply_adds == 28 * 28 * 6 * (5 * 5 * 3) == 352_800
    assert rows["conv1"].parameters == 6 * (5 * 5 * 3) + 6
    assert rows["conv2"].output_shape == (16, 10, 10)
    assert rows["conv2"].multiply_adds == 10 * 10 * 16 * (5 * 5 * 6) == 240_000
    assert rows["fc1"].multiply_adds == 400 * 120
    assert rows["fc2"].multiply_adds == 120 * 84
    assert rows["fc3"].multiply_adds == 84 * 10
    assert rows["fc3"].output_shape == (10,)
    assert sum(row.multiply_adds for row in layers(model.build("net"))) == 651_720
    assert [row.name for row in layers(model.build("net"))] == ["conv1", "pool", "conv2", "pool", "fc1", "fc2", "fc3"]


def test_the_table_ends_with_the_totals_and_the_size_of_the_file() -> None:
    network = model.build("net")
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    text = summarize(network)
    total = next(line for line in text.splitlines() if line.startswith("total"))
    assert total.split() == ["total", "62,006", "651,720"]
    assert f"has {len(file.getvalue()):,} bytes" in text
    conv2 = next(line for line in text.splitlines() if line.startswith("conv2"))
    assert conv2.split() == ["conv2", "Conv2d", "16", "x", "10", "x", "10", "2,416", "240,000"]


def test_strides_groups_and_shared_layers_are_counted_right() -> None:
    shared = nn.Conv2d(8, 8, 1, bias=False)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), shared, nn.Conv2d(8, 8, 3, groups=4, padding=1))
    rows = layers(network)
    assert [row.multiply_adds for row in rows] == [16 * 16 * 8 * 27, 16 * 16 * 8 * 8, 16 * 16 * 8 * (9 * 2)]
    twice = layers(nn.Sequential(nn.Conv2d(3, 8, 1), shared, nn.Sequential(shared)))
    assert [row.parameters for row in twice] == [32, 64, 0]
    assert [row.multiply_adds for row in twice[1:]] == [32 * 32 * 8 * 8] * 2


@pytest.mark.parametrize("name", model.NETWORKS)
def test_the_layers_add_up_to_the_module_and_leave_it_as_it_was(name: str) -> None:
    network = model.build(name).train()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    rows = layers(network)
    assert sum(row.parameters for row in rows) == sum(parameter.numel() for parameter in network.parameters())
    assert network.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_the_default_network_is_cheap() -> None:
    assert sum(row.multiply_adds for row in layers(model.build("cifar_net"))) <= 150_000_000
