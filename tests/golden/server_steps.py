"""One round of server training of DENSE, FedFTG and DFRD, worked out in PyTorch.

    python -m tests.golden.server_steps

writes server_steps.npz beside this file. Networks, losses and updates are written here
from the papers, with torch.nn.functional and autograd; shared with the library are only
the random draws and the names of parameters. Needs PyTorch; the test that compares does
not.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, schema
from mosaic_jax.core.types import GeneratorState, ModelState, Teachers
from mosaic_jax.server import METHODS, base
from tests import tiny

PATH = pathlib.Path(__file__).with_suffix(".npz")
KEY = prng.root(3)
TASK = base.Task(tiny.classifier(), (16, 16, 1), 4, "none", "auto", "train", 2)
COUNTS = np.array([[6, 0, 2, 1], [2, 4, 2, 0]])
# A large step of the student, so that a wrong gradient is seen.
SMALL = {
    "batch_size": 6,
    "latent_dim": 5,
    "width": 2,
    "student_learning_rate": 0.5,
}
FIELDS = {
    "dense": SMALL | {"generator_steps": 2, "pool": 2, "temperature": 3.0},
    "fedftg": SMALL | {"iterations": 1, "student_steps": 2},
    "fedftg_published": SMALL
    | {"iterations": 1, "student_steps": 1, "published": True},
    "dfrd": SMALL
    | {"iterations": 1, "generator_steps": 1, "student_steps": 1, "temperature": 2.0},
}
MEAN, STD = 0.4, 0.3


def method(name):
    """The server method of `FIELDS[name]`."""
    return schema.check(METHODS[name.partition("_")[0]], FIELDS[name], name)


def filled(shapes, seed):
    """Arrays of the given shapes, the same for everyone who asks."""
    np_rng = np.random.RandomState(seed)
    leaves, structure = jax.tree.flatten(shapes)
    made = [0.3 * np_rng.normal(size=leaf.shape) for leaf in leaves]
    tree = jax.tree.unflatten(structure, [jnp.asarray(x, jnp.float32) for x in made])
    # Running variances must be positive.
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.abs(x) + 0.5 if path[-1].key == "var" else x, tree
    )


def models():
    """Student and two teachers."""
    shape = jax.eval_shape(lambda: TASK.classifier.init(KEY, TASK.image_shape))

    def one(seed):
        return ModelState(filled(shape.params, seed), filled(shape.batch_stats, seed))

    teachers = jax.tree.map(lambda *x: jnp.stack(x), one(1), one(2))
    return one(0), Teachers(teachers, jnp.asarray(COUNTS), jnp.arange(len(COUNTS)))


def start(server):
    """The method's state with filled networks."""
    student, _ = models()
    state = server.init(TASK, student, KEY)

    def refill(generator, seed):
        return ModelState(
            filled(generator.params, seed), filled(generator.batch_stats, seed)
        )

    if isinstance(state, GeneratorState):
        return state.replace(model=refill(state.model, 7))
    if hasattr(state, "average"):
        generator = state.generator.replace(model=refill(state.generator.model, 7))
        return state.replace(generator=generator, average=refill(state.average, 8))
    return state


def _torch(tree):
    import torch

    return jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), tree)


class Torch:
    """The arithmetic, in PyTorch; images are [B, D, H, W] inside."""

    def __init__(self):
        """Import lazily: tests read this module without PyTorch."""
        import torch
        import torch.nn.functional as F

        self.torch, self.F = torch, F

    def norm(self, x, params, stats, train):
        """Batch-norm, and its new running statistics."""
        if not train:
            mean, var, new = stats["mean"], stats["var"], stats
        else:
            axes = [a for a in range(x.ndim) if a != 1]
            mean, var = x.mean(axes), x.var(axes, unbiased=False)
            count = x.numel() / x.shape[1]
            new = {
                "mean": 0.9 * stats["mean"] + 0.1 * mean.detach(),
                "var": 0.9 * stats["var"] + 0.1 * var.detach() * count / (count - 1),
            }
        shape = (1, -1, 1, 1)
        x = (x - mean.reshape(shape)) / (var.reshape(shape) + 1e-5).sqrt()
        if params is not None:
            x = x * params["scale"].reshape(shape) + params["bias"].reshape(shape)
        return x, new

    def conv(self, x, kernel, stride=1):
        """Kernel [k, k, in, out]."""
        return self.F.conv2d(x, kernel.permute(3, 2, 0, 1), stride=stride, padding=1)

    def linear(self, x, params):
        """Kernel [in, out]."""
        return x @ params["kernel"] + params["bias"]

    def classify(self, model, image, train=False):
        """Logits of signed images, batch moments, new statistics."""
        x = ((image + 1) / 2 - MEAN) / STD
        x = self.conv(x, model["params"]["conv"]["kernel"], 2)
        moments = {
            "mean": x.mean((0, 2, 3)),
            "var": x.var((0, 2, 3), unbiased=False),
        }
        params, stats = model["params"], model["batch_stats"]
        x, new = self.norm(x, params["bn"], stats["bn"], train)
        logits = self.linear(self.F.relu(x).mean((2, 3)), params["fc"])
        return logits, moments, {"bn": new}

    def upsampled(self, x, params, stats, train):
        """The body that DENSE and FedFTG share."""
        new = {}
        for i in range(3):
            name = f"BatchNorm_{i}"
            if i:
                x = self.F.interpolate(x, scale_factor=2, mode="nearest")
                x = self.conv(x, params[f"Conv_{i - 1}"]["kernel"])
            x, new[name] = self.norm(x, params[name], stats[name], train)
            x = self.F.leaky_relu(x, 0.2) if i else x
        x = self.conv(x, params["Conv_2"]["kernel"])
        return x + params["bias"].reshape(1, -1, 1, 1), new

    def square(self, x, width):
        """[B, features] as a map, channels last in the features."""
        return x.reshape(len(x), 4, 4, width).permute(0, 3, 1, 2)

    def dense(self, model, z, train=True):
        """DENSE's generator."""
        x = self.square(self.linear(z, model["params"]["Linear_0"]), 4)
        x, new = self.upsampled(
            x,
            model["params"]["_Upsampled_0"],
            model["batch_stats"]["_Upsampled_0"],
            train,
        )
        return 2 * self.torch.sigmoid(x) - 1, {"_Upsampled_0": new}

    def fedftg(self, model, z, label, train):
        """FedFTG's generator."""
        params, stats = model["params"], model["batch_stats"]
        one_hot = self.F.one_hot(label, 4).float()
        x = self.torch.cat(
            [
                self.square(self.linear(z, params["Linear_0"]), 2),
                self.square(self.linear(one_hot, params["Linear_1"]), 2),
            ],
            dim=1,
        )
        x, new = self.upsampled(x, params["_Upsampled_0"], stats["_Upsampled_0"], train)
        x = self.torch.tanh(x)
        x, last = self.norm(x, None, stats["BatchNorm_0"], train)
        return x, {"_Upsampled_0": new, "BatchNorm_0": last}

    def dfrd(self, model, z, label, train):
        """DFRD's generator: images and merged vectors."""
        params, stats = model["params"], model["batch_stats"]
        merged = z * params["embedding"][label]
        x, new = merged[:, :, None, None], {}
        for i in range(3):
            kernel = params[f"convs_{i}"]["kernel"].permute(3, 2, 0, 1)
            stride, padding = (2, 1) if i else (1, 0)
            x = self.F.conv_transpose2d(x, kernel, stride=stride, padding=padding)
            if i == 1:
                name = "norms_0"
                x, new[name] = self.norm(x, params[name], stats[name], train)
            x = self.F.relu(x) if i < 2 else self.torch.tanh(x)
        return x, merged, new

    def kl(self, p, q):
        """KL(softmax p || softmax q) per sample."""
        log_p, log_q = self.F.log_softmax(p, -1), self.F.log_softmax(q, -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def diversity(self, image, z, power):
        """exp(-mean over pairs of products of distances)."""
        x = image.flatten(1)
        on_x = ((x[:, None] - x[None]).abs() ** power).mean(-1)
        on_z = ((z[:, None] - z[None]) ** 2).mean(-1)
        return self.torch.exp(-(on_x * on_z).mean())

    def sgd(self, model, loss, new_stats, learning_rate, weight_decay):
        """Student after a plain step."""
        flat, structure = jax.tree.flatten(model["params"])
        gradients = self.torch.autograd.grad(loss, flat)
        moved = [
            (w - learning_rate * (g + weight_decay * w)).detach().requires_grad_()
            for w, g in zip(flat, gradients, strict=True)
        ]
        params = jax.tree.unflatten(structure, moved)
        return {"params": params, "batch_stats": new_stats}


def draws(server, at):
    """Noise and labels, as NumPy."""
    _, share = base.class_shares(jnp.asarray(COUNTS))
    label = base.draw_labels(prng.named(at, "label"), share, server.batch_size)
    shape = (server.batch_size, server.latent_dim)
    z = jax.random.normal(prng.named(at, "z"), shape)
    return np.array(z), np.array(label)


def _dicts(model):
    return {"params": model.params, "batch_stats": model.batch_stats}


def work_out(name, server):
    """Student after the round (and generator, where it is kept), as NumPy trees."""
    t = Torch()
    torch = t.torch
    student_jax, teachers_jax = models()
    student = _torch(_dicts(student_jax))
    clients = [
        _torch(_dicts(jax.tree.map(lambda x, i=i: x[i], teachers_jax.client_model)))
        for i in range(2)
    ]
    tau = torch.tensor(COUNTS / np.maximum(COUNTS.sum(0), 1)).float()
    state = start(server)
    if name == "dense":
        return {"student": _dense(t, server, student, clients)}
    if name.startswith("fedftg"):
        generator = _torch(_dicts(state.model))
        return _fedftg(t, server, student, clients, tau, generator)
    generator = _torch(_dicts(state.generator.model))
    average = _torch(_dicts(state.average))
    return _dfrd(t, server, student, clients, tau, generator, average)


def _dense(t, server, student, clients):
    torch, F = t.torch, t.F
    key = prng.named(KEY, "generator")
    from mosaic_jax.nn import conditional

    module = conditional.DenseGenerator(16, 1, server.width)
    shape = server.batch_size, server.latent_dim
    z = np.array(jax.random.normal(prng.named(key, "z"), shape))
    label = np.array(
        jax.random.randint(prng.named(key, "label"), shape[:1], 0, TASK.num_classes)
    )
    variables = module.init(prng.named(key, "init"), jnp.asarray(z), train=False)
    generator = _torch(dict(variables))
    z = torch.tensor(z, requires_grad=True)
    label = torch.tensor(label).long()
    leaves = [*jax.tree.leaves(generator["params"]), z]
    adam = torch.optim.Adam(
        leaves, lr=server.generator_learning_rate, betas=(0.5, 0.999)
    )
    best = None
    for _ in range(server.generator_steps):
        image, new = t.dense(generator, z)
        found = [t.classify(client, image) for client in clients]
        teacher = sum(logits for logits, _, _ in found) / 2
        distance = sum(
            (moments[m] - client["batch_stats"]["bn"][m].detach()).norm()
            for client, (_, moments, _) in zip(clients, found, strict=True)
            for m in ("mean", "var")
        )
        logits, _, _ = t.classify(student, image)
        apart = t.kl(teacher, logits) * (logits.argmax(-1) != teacher.argmax(-1))
        loss = (
            server.class_weight * F.cross_entropy(teacher, label)
            + server.statistics_weight * distance / 2
            - server.boundary_weight * apart.mean()
        )
        if best is None or loss < best[0]:
            best = loss.detach(), image.detach()
        adam.zero_grad()
        loss.backward()
        adam.step()
        generator["batch_stats"] = new
    # Kept in eight bits.
    image = torch.round((best[1] + 1) * 127.5) / 127.5 - 1
    teacher = sum(t.classify(client, image)[0] for client in clients).detach() / 2
    logits, _, new = t.classify(student, image, train=True)
    T = server.temperature
    loss = T**2 * t.kl(teacher / T, logits / T).mean()
    return t.sgd(student, loss, new, server.student_learning_rate, 0.0)


def _fedftg(t, server, student, clients, tau, generator):
    torch, F = t.torch, t.F
    z, label = (torch.tensor(x) for x in draws(server, prng.at(KEY, 0)))
    label = label.long()
    leaves = jax.tree.leaves(generator["params"])
    adam = torch.optim.Adam(leaves, lr=server.generator_learning_rate)

    def denormalise(x):
        return 2 * (x * STD + MEAN) - 1

    for client, share in zip(clients, tau, strict=True):
        raw, new = t.fedftg(generator, z, label, train=True)
        image = denormalise(raw)
        s, c = t.classify(student, image)[0], t.classify(client, image)[0]
        weight = share[label]
        each = F.cross_entropy(c, label, reduction="none")
        if server.published:
            apart = (s - c.detach()).abs().mean(-1)
            classified = each.mean() * weight.mean()
        else:
            apart, classified = t.kl(s, c), (weight * each).mean()
        loss = (
            -(weight * apart).mean()
            + server.class_weight * classified
            + server.diversity_weight * t.diversity(raw, z, 1) / 2
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
        generator["batch_stats"] = new
    image = denormalise(t.fedftg(generator, z, label, train=False)[0]).detach()
    target = sum(
        share[label][:, None] * F.softmax(t.classify(client, image)[0], -1)
        for client, share in zip(clients, tau, strict=True)
    ).detach()
    for _ in range(server.student_steps):
        logits, _, new = t.classify(student, image, train=True)
        loss = -(target * F.log_softmax(logits, -1)).sum(-1).mean()
        loss = loss / 4 if server.published else loss
        rates = server.student_learning_rate, server.weight_decay
        student = t.sgd(student, loss, new, *rates)
    return {"student": student, "generator": generator}


def _dfrd(t, server, student, clients, tau, generator, average):
    torch, F = t.torch, t.F

    def teach(image, label):
        return sum(
            share[label][:, None] * t.classify(client, image)[0]
            for client, share in zip(clients, tau, strict=True)
        )

    z, label = (
        torch.tensor(x)
        for x in draws(server, prng.at(prng.named(KEY, "generator"), 0, 0))
    )
    label = label.long()
    leaves = jax.tree.leaves(generator["params"])
    adam = torch.optim.Adam(
        leaves, lr=server.generator_learning_rate, betas=(0.5, 0.999)
    )
    image, merged, new = t.dfrd(generator, z, label, train=True)
    teacher, logits = teach(image, label), t.classify(student, image)[0]
    gained = (teacher.argmax(-1) == label) & (logits.argmax(-1) != label)
    transfer = (t.kl(teacher, logits) * gained).sum() / gained.sum().clamp(min=1)
    loss = (
        F.cross_entropy(teacher, label)
        - server.transfer_weight * transfer
        + server.diversity_weight * t.diversity(image, merged, 2)
    )
    loss.backward()
    adam.step()
    generator["batch_stats"] = new
    T, total = server.temperature, 0.0
    at = prng.at(prng.named(KEY, "student"), 0, 0)
    stats = student["batch_stats"]
    for source, name, weight in (
        (generator, "new", 1.0),
        (average, "average", server.average_share),
    ):
        z, label = (torch.tensor(x) for x in draws(server, prng.named(at, name)))
        image = t.dfrd(source, z, label.long(), train=False)[0].detach()
        target = teach(image, label.long()).detach()
        current = {"params": student["params"], "batch_stats": stats}
        logits, _, stats = t.classify(current, image, train=True)
        total = total + weight * t.kl(target / T, logits / T).mean()
    rates = server.student_learning_rate, server.weight_decay
    student = t.sgd(student, total, stats, *rates)
    return {"student": student, "generator": generator}


def main() -> None:
    """Write the file."""
    found = {}
    for name in FIELDS:
        server = method(name)
        trees = work_out(name, server)
        flat, _ = jax.tree_util.tree_flatten_with_path(
            trees, is_leaf=lambda x: hasattr(x, "detach")
        )
        for path, leaf in flat:
            place = "/".join([name, *(str(part.key) for part in path)])
            found[place] = leaf.detach().numpy()
    np.savez_compressed(PATH, **found)
    print(f"{len(found)} arrays in {PATH}")


if __name__ == "__main__":
    main()
