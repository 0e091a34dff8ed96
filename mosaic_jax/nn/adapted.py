"""Any network as the library needs it: with a head, and batch-norm that knows the mask.

Beyond logits the library needs the features before the last layer, and that layer
alone. A network that does not name them is watched while it computes: its head is the
layer whose output is the logits.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from mosaic_jax.core import errors
from mosaic_jax.core.types import Array


class Adapted(nn.Module):
    """A user's network with the methods that the library calls.

    Its variables are those of the user's network, in the same places.

    Attributes:
      of_user: the user's network.
      num_classes: K.
      path: where the head lies in `of_user`; () where that has methods `features` and
        `head`.
      head_apply: `head_apply({"params": those of the head}, features)`.
    """

    of_user: nn.Module
    num_classes: int
    path: tuple[str, ...] = ()
    head_apply: Callable[..., Any] | None = None

    def __hash__(self) -> int:
        # Fields of a network may be lists, as those of `nn.Sequential`.
        return hash((type(self.of_user), self.num_classes, self.path))

    def setup(self) -> None:
        """The variables of `of_user`."""
        nn.share_scope(self, self.of_user)

    def features(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Features [B, F] of normalised images `x` [B, H, W, D]."""
        if not self.path:
            of_user: Any = self.of_user
            return _called(of_user.features, x, train, mask)
        return _called(self.of_user, x, train, mask, stop_at=self.path)

    def head(self, features: Array) -> Array:
        """Logits [..., K] of features [..., F]."""
        if self.head_apply is None:
            of_user: Any = self.of_user
            return of_user.head(features)
        params = self.variables["params"]
        for name in self.path:
            params = params[name]
        return self.head_apply({"params": params}, features)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits [B, K] of normalised images `x` [B, H, W, D] float32."""
        return _called(self.of_user, x, train, mask)


@dataclasses.dataclass(frozen=True)
class Handed:
    """A user's network as an object, not yet adapted to the images of a study."""

    network: nn.Module

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> Adapted:
        """The network for images of `image_shape` (H, W, D) of `num_classes` classes.

        Raises:
          ConfigError: it cannot be applied to such images, or has no head to be found.
        """
        network = self.network
        if isinstance(network, nnx.bridge.ToLinen):
            from mosaic_jax.nn import adapted_nnx

            return adapted_nnx.build(network, num_classes, image_shape)
        if callable(getattr(network, "features", None)) and hasattr(network, "head"):
            return Adapted(network, num_classes)
        name = type(network).__name__
        try:
            found = _find_head(network, image_shape)
        except Exception as error:  # whatever the user's network raises
            raise errors.ConfigError(
                f"model = {name}: cannot be applied to images {image_shape}:"
                f" {type(error).__name__}: {errors.reason(error)}"
            ) from error
        if found is None:
            raise errors.ConfigError(
                f"model = {name}: must end in a layer from features [B, F] to logits,"
                " such as nn.Dense, or have methods `features` and `head`"
            )
        head = found.clone(parent=None, name=None)
        return Adapted(network, num_classes, found.path, head.apply)


def _find_head(
    network: nn.Module, image_shape: tuple[int, int, int]
) -> nn.Module | None:
    """The innermost layer whose output is the logits, with where it lies in `path`."""
    found: list[nn.Module] = []

    def run(image: Array) -> Any:
        outputs: list[tuple[nn.Module, Any]] = []

        def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            output = call(*args, **kwargs)
            takes_features = len(args) == 1 and not kwargs and jnp.ndim(args[0]) == 2
            if context.method_name == "__call__" and takes_features:
                outputs.append((context.module, output))
            return output

        def logits(module: nn.Module, image: Array) -> Any:
            return _called(module, image, False, None)

        with nn.intercept_methods(watch):
            key = jax.random.key(0)
            result, _ = network.init_with_output(key, image, method=logits)
        found.extend(one for one, output in outputs if output is result and one.path)
        return result

    jax.eval_shape(run, jax.ShapeDtypeStruct((2, *image_shape), jnp.float32))
    return found[0] if found else None


def _called(
    function: Any,
    x: Array,
    train: bool,
    mask: Array | None,
    *,
    stop_at: tuple[str, ...] = (),
) -> Array:
    """A user's network, or its method `features`, given what it takes.

    Args:
      function: it takes images, and `train` and `mask` if it names them.
      x: normalised images [B, H, W, D].
      train: whether batch-norm uses the moments of the batch.
      mask: [B] bool, images that count in them; flax's batch-norm gets it even where
        the network does not take it. None: all count.
      stop_at: the layer that lies there returns what it is given; (): none does.
    """
    call = type(function).__call__ if isinstance(function, nn.Module) else function
    # Layers that were made outside of the network keep the name that it has here.
    places = (stop_at, ("of_user", *stop_at))

    def between(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if stop_at and context.method_name == "__call__" and module.path in places:
            return args[0]
        if isinstance(module, nn.BatchNorm) and mask is not None and args:
            shape = (len(mask), *[1] * (args[0].ndim - 1))
            kwargs = {"mask": mask.reshape(shape)} | kwargs
        return call(*args, **kwargs)

    with nn.intercept_methods(between):
        return function(x, **takes(call, train=train, mask=mask))


def takes(function: Callable[..., Any], **given: Any) -> dict[str, Any]:
    """Those of the arguments `given` that a user's function names."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name in names}
