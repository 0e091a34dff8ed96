"""What each stage of a study will compute, known before it runs."""

from collections.abc import Callable

import numpy as np

from mosaic_jax import flops, gan, settings, stages
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.classifier import Classifier
from mosaic_jax.data import federated
from mosaic_jax.data.federated import StudyData
from mosaic_jax.distillation.base import ServerTraining, Task
from mosaic_jax.stages import audit, generators
from mosaic_jax.stages.parts import Parts


def flops_by_stage(
    config: settings.Settings,
    data: StudyData,
    networks: dict[str, Classifier],
    algorithm: Algorithm,
    server: ServerTraining | None,
    task: Task,
) -> dict[str, float]:
    """FLOPs of each stage of the study, evaluations included.

    As `mosaic_jax.flops` counts, for all clients and the server.
    """
    result = {}
    for stage in stages.pipeline(config):
        name, _, network = stage.name.partition("@")
        result[stage.name] = _Study(
            config, data, networks, network, algorithm, server, task
        ).of(name)
    return result


class _Study:
    """As clients with one network see it."""

    def __init__(
        self,
        config: settings.Settings,
        data: StudyData,
        networks: dict[str, Classifier],
        network: str,
        algorithm: Algorithm,
        server: ServerTraining | None,
        task: Task,
    ) -> None:
        names = list(networks)
        place = names.index(network) if network else 0
        members = np.arange(config.data.num_clients)[place :: len(names)]
        self.config, self.server, self.task = config, server, task
        self.everyone, self.data = data, federated.of_clients(data, members)
        self.networks, self.algorithm = networks, algorithm
        self.classifier = networks[names[place]]
        self.shape = data.info.image_shape
        self.forward = self.classifier.flops(self.shape)

    def of(self, name: str) -> float:
        """FLOPs of stage `name`."""
        found: dict[str, Callable[[], float]] = {
            "init": lambda: self._rounds(self.config.init.rounds),
            "warmup": lambda: self._rounds(self.config.warmup.rounds),
            "finetune": lambda: self._rounds(self.config.finetune.rounds),
            "generators": self._generators,
            "experts": self._experts,
            "prototypes": self._prototypes,
            "meta": lambda: self._teacher() * self._num_held_out,
            "distill": self._distill,
            "server": self._server,
            "reference": self._reference,
            "audit": self._audit,
        }
        return found[name]()

    @property
    def _num_held_out(self) -> int:
        return sum(len(images.label) for images in self.data.held_out.values())

    @property
    def _each(self) -> np.ndarray:
        """[C] of a forward pass of each client's network."""
        count = self.data.clients.num_clients
        if not self.algorithm.partial:
            return np.full(count, self.forward)
        rates = self.config.budgets.of_clients(count)
        groups = Parts(self.classifier, self.algorithm, rates)
        of_rate = {
            group.rate: groups.classifier_of(group.rate).flops(self.shape)
            for group in groups.groups
        }
        return np.array([of_rate[rate] for rate in rates])

    @property
    def _query(self) -> float:
        """Of clients' moments of one model."""
        if not self.algorithm.queries:
            return 0.0
        local = self.config.local
        images = self.data.clients.num_clients * local.steps * local.batch_size
        return images * self.forward

    def _rounds(self, rounds: int) -> float:
        config, local = self.config, self.config.local
        count = self.data.clients.num_clients
        taking_part = config.init.clients_per_round or count
        images = local.steps * local.batch_size
        total = rounds * taking_part * images * flops.TRAINED * self._each.mean()
        evaluations = -(-rounds // config.evaluation.every) + 1
        total += evaluations * (self._num_held_out * self.forward + self._query)
        if config.trains_every_round:
            total += self.server.flops(self.task, taking_part, rounds)
        return float(total)

    def _generators(self) -> float:
        config, size = self.config.generators, self.data.clients.client.size
        steps = generators.num_steps(config, size)
        model_gan = gan.build(self.config, self.data.info, self.classifier)
        total = steps.sum() * config.batch_size * model_gan.step_flops(self.shape)
        if config.classifier == "fresh":
            batch = self.config.local.batch_size
            steps = generators.steps_of_epochs(config.classifier_epochs, size, batch)
            total += steps.sum() * batch * flops.TRAINED * self.forward
        return float(total)

    def _experts(self) -> float:
        local = self.config.local
        images = self.config.experts.local_steps * local.batch_size
        total = images * flops.TRAINED * self._each.sum()
        # Each expert is measured on the test images.
        num_experts = self.data.info.num_classes
        each = self._num_held_out * self.forward + self._query
        return float(total + num_experts * each)

    def _prototypes(self) -> float:
        space, total = self.config.prototypes.space, 0.0
        for classifier in self.networks.values():
            experts = self.data.info.num_classes if space == "expert" else 1
            total += experts * classifier.flops(self.shape)
        size = self.everyone.clients.client.size.sum()
        return float(size * (total + 2 * self.forward))

    def _teacher(self) -> float:
        """Of one image: every expert of every network."""
        total = sum(one.flops(self.shape) for one in self.networks.values())
        return self.data.info.num_classes * total

    def _distill(self) -> float:
        config = self.config.distill
        model_gan = gan.build(self.config, self.data.info, self.classifier)
        generator, _ = model_gan.flops(self.shape)
        each = self._teacher() + generator + flops.TRAINED * self.forward
        images = config.samples_per_generator * self.config.data.num_clients
        return config.steps * images * each + self._num_held_out * self.forward

    def _reference(self) -> float:
        images = self.config.audit.reference_steps * audit.BATCH_SIZE
        return (images * flops.TRAINED + self._num_held_out) * self.forward

    def _audit(self) -> float:
        """Of generators and features; distances are small beside them."""
        model_gan = gan.build(self.config, self.data.info, self.classifier)
        generator, _ = model_gan.flops(self.shape)
        clients = self.config.data.num_clients
        total = clients * self.config.audit.images * (generator + self.forward)
        most = np.minimum(self.everyone.clients.client.size, audit.MOST_MEMBERS)
        return float(total + 2 * most.sum() * self.forward)

    def _server(self) -> float:
        teachers = self.config.data.num_clients
        if self.config.server.participants == "latest":
            teachers = self.config.init.clients_per_round or teachers
        total = self.server.flops(self.task, teachers, self.config.server.rounds)
        return total + self._num_held_out * self.forward
