"""Arrays, trees of arrays, and the containers of them that the library passes around.

The prefix of a variable tells its leading axis: `client_model` leaves are
[num_clients, ...], `expert_model` leaves [num_classes, ...], `model` has none.
"""

from typing import Any

import flax.struct
import jax
import numpy as np

# An array in host memory or on a device. Random keys and what a jitted function
# returns are always a `jax.Array`.
Array = jax.Array | np.ndarray
# Any nesting of containers with arrays as leaves.
Tree = Any
# Base of the containers: frozen dataclasses that are pytrees, with `replace`.
Struct = flax.struct.PyTreeNode


class ModelState(Struct):
    """All variables of a network: trainable `params` and running `batch_stats`."""

    params: Tree
    batch_stats: Tree

    @property
    def variables(self) -> dict[str, Tree]:
        """The mapping that `module.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Batch(Struct):
    """A minibatch.

    `image` [B, H, W, D] float32, `label` [B] int32; `mask` [B] bool is False for
    entries that only pad the batch.
    """

    image: Array
    label: Array
    mask: Array


class LabelledImages(Struct):
    """Images `image` uint8 [N, H, W, D] with their classes `label` int32 [N]."""

    image: Array
    label: Array


class Client(Struct):
    """The data of one client; with a leading axis C, of all clients.

    `number` int32 [] identifies the client, for random keys; `index` int32 [M] holds
    the numbers of its `size` [] images, followed by padding; `label_count` int32 [K] is
    its number of images of each class, in private studies what it tells of it. `noise`
    float32 [] is the noise multiplier of private studies, else None.
    """

    number: Array
    index: Array
    size: Array
    label_count: Array
    noise: Array | None = None


class FederatedDataset(Struct):
    """The data of all clients: each image is stored once, a client is a row of indices.

    `images` are those of all clients (of several devices each holds those of its own
    clients); () where they stay in host memory. `client` has the leading axis C.
    """

    images: Tree
    client: Client

    @property
    def num_clients(self) -> int:
        """Number of clients C."""
        return self.client.index.shape[0]

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.client.label_count.shape[1]


class Teachers(Struct):
    """What m clients sent to a server that trains on it.

    `client_model` [m, ...] are their models, `label_count` int [m, K] the labels that
    they trained on, and `number` int32 [m] identifies them: a loop over clients goes in
    its order. `generators` are a `Generators` of all clients, for methods that ask for
    them, else empty.
    """

    client_model: ModelState
    label_count: Array
    number: Array
    generators: Tree = ()


class GeneratorState(Struct):
    """Training state of a generator on the server."""

    model: ModelState
    opt_state: Tree


class DFRDState(Struct):
    """State of DFRD: its generator and the generator's running mean over rounds."""

    generator: GeneratorState
    average: ModelState


class DenseState(Struct):
    """State of DENSE.

    `image` uint8 [P, B, H, W, D] is the pool of synthetic batches, `count` int32 []
    the number of batches made so far, `opt_state` that of the student's optimiser.
    """

    image: Array
    count: Array
    opt_state: Tree


class CoBoostingState(Struct):
    """State of Co-Boosting.

    `image` uint8 [P, B, H, W, D] and `label` int32 [P, B] are the pool of synthetic
    batches, `count` int32 [] the number of batches made so far, `weight` float32 [C]
    those of the clients in the teacher, `opt_state` that of the student's optimiser.
    """

    image: Array
    label: Array
    count: Array
    weight: Array
    opt_state: Tree


class FedGenState(Struct):
    """State of FedGen: its generator of features, and the shares of the classes [K]."""

    generator: GeneratorState
    share: Array


class ServerState(Struct):
    """Everything that the next federated round starts from.

    `model` is the global model; `server` and `client` [C, ...] are states of the
    algorithm. `last_round` int32 [C] is the round that each client last took part in,
    counted over the study, -1 before its first. `client_model` [C, ...] are the local
    models of that round where they are kept, else empty; `training` is the state of
    training on the server, if there is any; `anchor` is the model that clients stay
    near in all rounds of a stage, if there is one. `error` [C, ...] is what compression
    left out of each client's uploads so far, where it is fed back. `clip` [] is the
    longest update that counts in full, where a client's is private.
    """

    model: ModelState
    server: Tree
    client: Tree
    last_round: Array
    client_model: Tree
    training: Tree = ()
    anchor: Tree = ()
    error: Tree = ()
    clip: Tree = ()


class ClientModels(Struct):
    """The models that the clients have after federated rounds, and how old they are.

    `model` [C, ...] is each client's local model of the round `last_round` int32 [C]
    that it last took part in; a client that never did, -1, has the global model.
    """

    model: ModelState
    last_round: Array


class GanState(Struct):
    """Training state of a client's GAN.

    `average` is the generator's running mean, () where none is kept; `discriminator`
    and its optimiser's state are () where there is none.
    """

    generator: ModelState
    discriminator: Tree
    average: Tree
    generator_opt: Tree
    discriminator_opt: Tree


class Generators(Struct):
    """The uploaded generators [C, ...]; `alive` bool [C] is False if collapsed."""

    model: ModelState
    alive: Array


class Experts(Struct):
    """One expert per class [K, ...]; `present` bool [K]: some client has the class."""

    model: ModelState
    present: Array


class Prototypes(Struct):
    """Class prototypes of all clients, P of them, as NumPy arrays.

    `logits` [P, E, K] are those of each expert, network by network; `gate_logits`
    [P, K] those of the global model; `label` int32 [P] is a prototype's class and
    `client` int32 [P] the client it comes from. The features themselves, one vector
    per expert, would be too large to keep; the teacher needs the logits alone.
    """

    logits: Array
    gate_logits: Array
    label: Array
    client: Array


class Gathered(Struct):
    """Prototypes that clients sent round by round, P of them, as NumPy arrays.

    `feature` float32 [P, F] are those of the global model as it was received; `label`
    int32 [P], `client` int32 [P] and `round` int32 [P], over the study, tell whose
    centre of which class it is, and when it was sent.
    """

    feature: Array
    label: Array
    client: Array
    round: Array


class MetaState(Struct):
    """Training state of the meta head.

    `ema_params` is the exponential moving average of `params`, started at zero and not
    corrected for that bias.
    """

    params: Tree
    ema_params: Tree
    opt_state: Tree


class Teacher(Struct):
    """The ensemble that the student learns from.

    `experts` by the name of their network, `meta_params` of the head that fuses them,
    and `gate`, the global model, which the gate weighs them by.
    """

    experts: dict[str, Experts]
    meta_params: Tree
    gate: ModelState


class StudentState(Struct):
    """Training state of the student."""

    model: ModelState
    opt_state: Tree
