"""Shared array containers.

The prefix of a variable tells its leading axis: `client_model` leaves are
[num_clients, ...], `expert_model` leaves [num_classes, ...], `model` has none.
"""

from typing import Any

import flax.struct
import jax

Array = jax.Array
Tree = Any


@flax.struct.dataclass
class ModelState:
    """All variables of a network: trainable `params` and running `batch_stats`."""

    params: Tree
    batch_stats: Tree

    @property
    def variables(self) -> dict[str, Tree]:
        """The mapping that `module.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


@flax.struct.dataclass
class Batch:
    """`image` [B, H, W, D] float32, `label` [B] int32, `mask` [B] bool (True: real)."""

    image: Array
    label: Array
    mask: Array


@flax.struct.dataclass
class LabelledImages:
    """`image` uint8 [N, H, W, D], `label` int32 [N]."""

    image: Array
    label: Array


@flax.struct.dataclass
class Client:
    """What one client holds; with a leading axis C, what all hold.

    `number` int32 [] names it, for random keys; `index` int32 [M] holds the numbers of
    its `size` [] images, then padding; `label_count` int32 [K].
    """

    number: Array
    index: Array
    size: Array
    label_count: Array


@flax.struct.dataclass
class FederatedDataset:
    """All clients' data: images once, a client is a row of indices.

    `images` of all clients (on several devices, each holds those of its own clients);
    `client` with leading axis C.
    """

    images: LabelledImages
    client: Client

    @property
    def num_clients(self) -> int:
        """Number of clients C."""
        return self.client.index.shape[0]

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.client.label_count.shape[1]


@flax.struct.dataclass
class Teachers:
    """What clients sent to a server that trains: leading axis m.

    `client_model` are their models, `label_count` int [m, K] the labels they used and
    `number` int32 [m] names them: what goes through clients in turn goes by it.
    """

    client_model: ModelState
    label_count: Array
    number: Array


@flax.struct.dataclass
class GeneratorState:
    """A generator in training on the server."""

    model: ModelState
    opt_state: Tree


@flax.struct.dataclass
class DFRDState:
    """DFRD's generator, and its running mean over rounds."""

    generator: GeneratorState
    average: ModelState


@flax.struct.dataclass
class DenseState:
    """DENSE's pool uint8 [P, B, H, W, D], batches made so far [], student optimiser."""

    image: Array
    count: Array
    opt_state: Tree


@flax.struct.dataclass
class ServerState:
    """All that a resumed federated round needs.

    `model` is the global model, `server` and `client` [C, ...] are states of the
    algorithm. `last_round` int32 [C] is the round each client last trained in, numbered
    over the study, -1 before its first; `client_model` [C, ...] are the local models of
    that round where they are kept, else empty; `training` is the state of training on
    the server, if any.
    """

    model: ModelState
    server: Tree
    client: Tree
    last_round: Array
    client_model: Tree
    training: Tree = ()


@flax.struct.dataclass
class ClientModels:
    """The models that the clients have after rounds, and how old they are.

    `model` [C, ...] is each client's own of the round `last_round` int32 [C] that it
    last trained in; of one that never did, -1, the global model.
    """

    model: ModelState
    last_round: Array


@flax.struct.dataclass
class GanState:
    """One client's GAN in training; `average` is the running mean of the generator."""

    generator: ModelState
    discriminator: ModelState
    average: ModelState
    generator_opt: Tree
    discriminator_opt: Tree


@flax.struct.dataclass
class Generators:
    """The uploaded generators [C, ...]; `alive` bool [C] is False where collapsed."""

    model: ModelState
    alive: Array


@flax.struct.dataclass
class Experts:
    """One classifier per class [K, ...]; `present` bool [K]: some client holds it."""

    model: ModelState
    present: Array


@flax.struct.dataclass
class Prototypes:
    """Class prototypes of all clients, P in all.

    `logits` [P, E, K] of each expert, one network's after the other's; `gate_logits`
    [P, K] of the global model; `label` int32 [P]; `client` int32 [P]. NumPy arrays: a
    prototype's features in all experts' spaces are too many to keep, and enter the
    teacher by these alone.
    """

    logits: Array
    gate_logits: Array
    label: Array
    client: Array


@flax.struct.dataclass
class MetaState:
    """The meta head in training; `ema_params` is the biased average of `params`."""

    params: Tree
    ema_params: Tree
    opt_state: Tree


@flax.struct.dataclass
class Teacher:
    """The fused ensemble that the student learns from.

    `experts` by network; `gate` is the global model.
    """

    experts: dict[str, Experts]
    meta_params: Tree
    gate: ModelState


@flax.struct.dataclass
class StudentState:
    """The student in training."""

    model: ModelState
    opt_state: Tree
