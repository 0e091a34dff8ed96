# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own algorithm, network and data
#
# Everything that a study is made of may be an object of this notebook. We draw a data
# set, write a network in plain flax, and an algorithm, and run it against FedAvg
# where clients hold unlike classes.

# %%
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mosaic_jax as mj

# %% [markdown]
# ## Data: stripes
#
# Noisy waves of four directions; the direction is the class. `mj.data.arrays` takes
# images as uint8 or floats in [0, 1], of any size.


# %%
def stripes(seed, count, size=16, classes=4):
    """Images [count, size, size] in [0, 1], and labels [count]."""
    rng = np.random.RandomState(seed)
    label = np.arange(count) % classes
    angle = (np.pi * label / classes)[:, None, None]
    phase = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    y, x = np.mgrid[:size, :size]
    wave = np.sin(x[None] * np.cos(angle) + y[None] * np.sin(angle) + phase)
    image = 0.5 + 0.25 * (wave + rng.normal(0, 1.5, wave.shape))
    return image.clip(0, 1), label


images, labels = stripes(0, 600)
figure, axes = plt.subplots(1, 4, figsize=(8, 2))
for axis, image in zip(axes, images, strict=False):
    axis.imshow(image, cmap="gray")
    axis.axis("off")
plt.show()

# %% [markdown]
# ## A split: each client holds two classes


# %%
def two_directions(labels, num_clients, rng):
    """Image numbers of clients, who in turn share classes 0 and 1, or 2 and 3."""
    groups = [rng.permutation(np.flatnonzero(labels // 2 == i)) for i in range(2)]
    return [groups[i % 2][i // 2 :: num_clients // 2] for i in range(num_clients)]


# %% [markdown]
# ## A network
#
# All that the library knows of it is images in, logits out. It finds the head by
# itself: the layer whose output is the logits.


# %%
class Patches(nn.Module):
    """The same two layers for every patch of 4 x 4 pixels, then their mean."""

    classes: int = 4
    width: int = 32

    @nn.compact
    def __call__(self, x):
        batch, height, width, depth = x.shape
        x = x.reshape(batch, height // 4, 4, width // 4, 4, depth)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, 16 * depth)
        x = nn.relu(nn.Dense(2 * self.width)(nn.relu(nn.Dense(self.width)(x))))
        return nn.Dense(self.classes)(x.mean(axis=1))


# %% [markdown]
# ## An algorithm
#
# Whatever is not overridden is FedAvg. This one has momentum on the server: it keeps
# the last step (`init_server`) and goes on along it (`aggregate`). The library takes
# care of checkpoints, resuming, batching over clients and of several devices.


# %%
@dataclasses.dataclass(frozen=True)
class ServerMomentum(mj.Algorithm):
    """FedAvg whose server goes on along its earlier steps (Hsu et al., 2019)."""

    momentum: float = 0.9

    def init_server(self, model):
        """The last step, 0 at first."""
        return jax.tree.map(jnp.zeros_like, model.params)

    def aggregate(self, server_state, model, mean_upload, share):
        """The new step, and the global model after it."""
        step = jax.tree.map(
            lambda last, old, new: self.momentum * last + (new - old),
            server_state,
            model.params,
            mean_upload.params,
        )
        params = jax.tree.map(jnp.add, model.params, step)
        return step, mean_upload.replace(params=params)


# %% [markdown]
# ## Both, on equal terms
#
# Split, initial model and batches come from the seed and are the same for both.

# %%
config = mj.configs.get(
    "digits_mosaic",
    method="federated",
    data={"num_clients": 4, "validation": 0.0},
    init={"rounds": 60},
    finetune={"rounds": 0},
    evaluation={"every": 5},
)
parts = {
    "model": Patches(),
    "data": mj.data.arrays(images, labels, *stripes(1, 200)),
    "partition": two_directions,
}
results = {
    "FedAvg": mj.Study(config, "runs/own_fedavg", **parts).run(),
    "momentum": mj.Study(
        config, "runs/own_momentum", algorithm=ServerMomentum(momentum=0.8), **parts
    ).run(),
}

# %%
for name, result in results.items():
    rounds = result.history.set_index("step")["test_accuracy"].dropna()
    rounds.plot(label=name, xlabel="round", ylabel="test accuracy")
plt.legend()
plt.show()

# %%
mj.compare(results)

# %% [markdown]
# Momentum of 0.8 makes the steps of the server up to five times as long, so part of
# what it gains is a larger rate: a fair comparison also searches for FedAvg's own, on
# validation images (`data.validation`).
#
# ## Code counts
#
# Change a constant of the network, or the body of a hook, and run the cells again:
# what it is part of is trained anew, and nothing else. FedAvg of above is found as it
# is:

# %%
again = mj.Study(config, "runs/own_fedavg", **parts).run()
print(again.summary.seconds == results["FedAvg"].summary.seconds)

# %% [markdown]
# A wrong setting is told before any work:

# %%
try:
    mj.Study(config, algorithm=ServerMomentum, data="stripes")
except Exception as error:
    print(type(error).__name__, error)

# %% [markdown]
# The next step is a file of your own, `my_file.py`, whose parts any command knows by
# their import path: `--config.init.method=my_file:ServerMomentum`.
# `examples/outside_package` has one of each kind, and `docs/adding_a_method.md` tells
# what each must have.
