"""What becomes of uploads between local training and the algorithm's aggregation.

A client's update is first replaced, if the client attacks, then compressed; the server
combines what it reads by a rule. Or it is clipped, and its sum with the others' gets
noise that hides it. Each of these composes with any algorithm whose clients do local
SGD on the whole network.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mosaic_jax.core import prng, trees
from mosaic_jax.core.types import Array, Batch, Client, ModelState, Tree
from mosaic_jax.fl import attacks, compression, uploads
from mosaic_jax.fl.client_privacy import ClientMechanism
from mosaic_jax.fl.client_program import ClientProgram, Result, Traffic, Turn
from mosaic_jax.fl.local_sgd import Hooks, LocalSGD
from mosaic_jax.fl.robust import Mean
from mosaic_jax.fl.uploads import Attack, Compressor, Rule


@dataclasses.dataclass(frozen=True)
class Sending:
    """The rule, the attack and the compression of a study; by default none of them.

    Attributes:
      rule: by which the server combines uploads.
      withstands: attackers in a round that it is to withstand.
      attack: on updates; None: there is none.
      num_attackers: clients of the study that attack.
      num_clients: of the study.
      compressor: of updates; None: there is none.
      private: hides each client's update, where clients are private; None: none are.
      clients_in_round: that take part in each; 0: all of them.
    """

    rule: Rule = Mean()
    withstands: int = 0
    attack: Attack | None = None
    num_attackers: int = 0
    num_clients: int = 0
    compressor: Compressor | None = None
    private: ClientMechanism | None = None
    clients_in_round: int = 0

    @property
    def needs_each(self) -> bool:
        """Whether uploads are kept one by one, in place of their weighted sum."""
        return self.colludes or self.rule.needs_each

    @property
    def attacks_alone(self) -> bool:
        """Whether there is an attack, of which each client's is by itself."""
        return self.attack is not None and not self.attack.colludes

    @property
    def colludes(self) -> bool:
        """Whether there is an attack whose clients know each other's updates."""
        return self.attack is not None and self.attack.colludes

    @property
    def outnumbered(self) -> str:
        """That more clients attack than the rule is to withstand, in words; or ""."""
        drawn = self.clients_in_round or self.num_clients
        most = min(self.num_attackers, drawn)
        if not self.rule.needs_each or most <= self.withstands:
            return ""
        who = f"{self.num_attackers} attack"
        if drawn < self.num_clients:
            who += f", up to {most} of the {drawn} of a round"
        return f"{who}, the rule withstands {self.withstands}"

    def attackers(self, key: Array, number: Array) -> Array:
        """Whether the clients with these numbers attack, [...] bool.

        Args:
          key: random key of all rounds.
          number: [...] int32.
        """
        drawn = attacks.drawn(key, self.num_clients, self.num_attackers)
        return jnp.isin(number, drawn)

    def around(self, program: ClientProgram) -> ClientProgram:
        """A client's program, with what it sends attacked and compressed."""
        changes = self.attacks_alone, self.compressor, self.private
        if not any(changes):
            return program
        assert isinstance(program, LocalSGD)  # settings refuse others
        return Sender(program, self)

    def attacked(
        self, upload: Tree, reference: Tree, hostile: Array, key: Array
    ) -> Tree:
        """Uploads, with those of attackers replaced.

        Args:
          upload: leaves [m, ...]; of an attack that colludes, of all participants.
          reference: of the uploads, without the leading axis.
          hostile: [m] bool, which of them are attackers'.
          key: random key [].
        """
        assert self.attack is not None
        reference = jax.tree.map(lambda leaf: leaf[None], reference)
        update = uploads.update_of(upload, reference)
        update = self.attack.updates(update, hostile, key)
        false = uploads.updated(upload, reference, update)
        return jax.vmap(trees.select)(hostile, false, upload)

    def no_error(self, algorithm: Hooks, model: ModelState, count: int) -> Tree:
        """What `count` clients keep of their uploads before the first one, [C, ...].

        Zeros like the parameters that they send, or () where nothing is fed back.

        Args:
          algorithm: of the rounds.
          model: the global model.
          count: C, number of clients.
        """
        if self.compressor is None or not self.compressor.error_feedback:
            return ()
        sent = uploads.parameters(algorithm.reference(model))
        return trees.broadcast(jax.tree.map(jnp.zeros_like, sent), count)

    def first_clip(self) -> Tree:
        """The longest update that counts in full at first, []; () without one."""
        return () if self.private is None else jnp.float32(self.private.clip)


@dataclasses.dataclass(frozen=True)
class Sender(ClientProgram):
    """A client's program, with its upload replaced, compressed or hidden.

    Attributes:
      inner: what it does until then.
      sending: the attack, the compression and what hides it.
    """

    inner: LocalSGD
    sending: Sending

    def init(self, turn: Turn) -> Tree:
        """That of the inner program."""
        return self.inner.init(turn)

    def step(
        self, turn: Turn, carry: Tree, batch: Batch, step: Array
    ) -> tuple[Tree, Array]:
        """That of the inner program."""
        return self.inner.step(turn, carry, batch, step)

    def final(self, turn: Turn, carry: Tree, loss: Array) -> Result:
        """The upload and the model as the server reads them."""
        result = self.inner.final(turn, carry, loss)
        upload, error, differs = result.upload, (), jnp.array(True)
        reference = self.inner.algorithm.reference(turn.model)
        if self.sending.attacks_alone:
            differs = self.sending.attackers(turn.key, turn.client.number)
            rows = jax.tree.map(lambda leaf: leaf[None], upload)
            key = _draw(turn, "attack")
            rows = self.sending.attacked(rows, reference, differs[None], key)
            upload = trees.take(rows, 0)
        if self.sending.compressor is not None:
            upload, error = self._compressed(turn, upload, reference)
            differs = jnp.array(True)
        if self.sending.private is not None:
            return result.replace(upload=self._hidden(turn, upload, reference))
        read = self.inner.algorithm.sent_model(upload, turn.model)
        model = trees.select(differs, read, result.model)
        return Result(upload, model, result.state, error)

    def _hidden(self, turn: Turn, upload: Tree, reference: Tree) -> Tree:
        """The upload of a client that is private, and what tells of its length."""
        assert self.sending.private is not None
        update = uploads.update_of(upload, reference)
        update, short = self.sending.private.sent(
            update, turn.clip, _draw(turn, "privacy")
        )
        return uploads.updated(upload, reference, update), short

    def traffic(self, image_shape: tuple[int, int, int], client: Client) -> Traffic:
        """That of the inner program, its upload compressed."""
        up, down = self.inner.messages(image_shape, client)
        if self.sending.compressor is not None:
            encode = functools.partial(compression.encode, self.sending.compressor)
            up = jax.eval_shape(encode, up, jax.eval_shape(prng.root, 0))
        private, number = self.sending.private, jax.ShapeDtypeStruct((), jnp.float32)
        if private is not None and private.quantile:
            up, down = (up, number), (down, number)
        return Traffic(trees.num_bytes(up), trees.num_bytes(down))

    def _compressed(
        self, turn: Turn, upload: Tree, reference: Tree
    ) -> tuple[Tree, Tree]:
        """The upload as the server reads it, and what it lacks."""
        compressor = self.sending.compressor
        assert compressor is not None
        update = uploads.update_of(upload, reference)
        if compressor.error_feedback:
            update = trees.add(update, turn.error)
        change = uploads.with_parameters(upload, update)
        message = compression.encode(compressor, change, _draw(turn, "compression"))
        read = uploads.parameters(compression.decode(compressor, message, change))
        error = ()
        if compressor.error_feedback:
            error = jax.tree.map(jnp.subtract, update, read)
        return uploads.updated(upload, reference, read), error


def _draw(turn: Turn, purpose: str) -> jax.Array:
    """The random key [] of a client's turn for a purpose."""
    return prng.at(prng.named(turn.key, purpose), turn.number, turn.client.number)
