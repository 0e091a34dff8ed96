"""The PyTorch loops of benchmarks.client_step: a worker in environment torch."""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from benchmarks import torch_models

LATENT = 100
LAYOUTS = {
    "PyTorch loop": torch.contiguous_format,
    "PyTorch loop, channels last": torch.channels_last,
}
# Name to a call that takes one step of all clients, once `prepare` was called.
_loops: dict[str, Callable[[], None]] = {}


def resnet_client(
    width: int, layout: torch.memory_format, learning_rate: float
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """One client's step of SGD: (image, label).

    Args:
      width: of the network.
      layout: of images and parameters in memory.
      learning_rate: of SGD.
    """
    net = torch_models.ResNet18(width).to(memory_format=layout)
    sgd = torch.optim.SGD(net.parameters(), learning_rate, weight_decay=1e-4)

    def step(image: torch.Tensor, label: torch.Tensor) -> None:
        sgd.zero_grad()
        functional.cross_entropy(net(image), label).backward()
        sgd.step()

    return step


def gan_client(
    width: int, layout: torch.memory_format, learning_rate: float
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """One client's step of both players, by Adam at a rate of its own.

    Args:
      width: of the networks.
      layout: of images and parameters in memory.
      learning_rate: not used.
    """
    del learning_rate
    generator = torch_models.Generator(width).to(memory_format=layout)
    discriminator = torch_models.Discriminator(width).to(memory_format=layout)
    adam = [
        torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999))
        for net in (generator, discriminator)
    ]
    judge = functional.binary_cross_entropy_with_logits

    def step(image: torch.Tensor, label: torch.Tensor) -> None:
        one, zero = torch.ones(len(label)), torch.zeros(len(label))
        fake = generator(torch.randn(len(label), LATENT))
        adam[1].zero_grad()
        loss = judge(discriminator(image), one)
        (loss + judge(discriminator(fake.detach()), zero)).backward()
        adam[1].step()
        adam[0].zero_grad()
        judge(discriminator(fake), one).backward()
        adam[0].step()

    return step


CLIENTS = {"resnet18": resnet_client, "gan": gan_client}


def prepare(
    arrays: dict[str, np.ndarray], network: str, width: int, learning_rate: float
) -> dict[str, np.ndarray]:
    """Networks and optimisers of all clients.

    Args:
      arrays: image [clients, B, H, W, D], label [clients, B].
      network: "resnet18" or "gan".
      width: of the networks.
      learning_rate: of SGD.
    """
    images = [torch_models.batch(image) for image in arrays["image"]]
    labels = [torch.tensor(label).long() for label in arrays["label"]]

    def loop(layout: torch.memory_format) -> Callable[[], None]:
        steps = [CLIENTS[network](width, layout, learning_rate) for _ in images]
        laid = [image.contiguous(memory_format=layout) for image in images]

        def run() -> None:
            for step, image, label in zip(steps, laid, labels, strict=True):
                step(image, label)

        return run

    _loops.update({name: loop(layout) for name, layout in LAYOUTS.items()})
    return {}


def step(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """One step of all clients by the loop called `name`."""
    del arrays
    _loops[name]()
    return {}
