"""A user's network of flax.nnx as the library needs it, see `adapted`.

`nnx.bridge.to_linen(Net, ...)` says how it is made: a study makes it for each of its
random keys, so an instance, which has its values already, would not do.
"""

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mosaic_jax.core import errors
from mosaic_jax.core.types import Array
from mosaic_jax.nn.adapted import Adapted, takes

# What is done in place of a call of a layer: (layer, its call, arguments) -> output.
_Between = Callable[[nnx.Module, Callable[..., Any], tuple, dict[str, Any]], Any]
_between: contextvars.ContextVar[_Between] = contextvars.ContextVar("between")
Path = tuple[Any, ...]


class AdaptedNnx(Adapted):
    """A user's network of flax.nnx with the methods that the library calls.

    Its variables are those that `nnx.bridge.ToLinen` keeps.
    """

    def features(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Features [B, F] of normalised images `x` [B, H, W, D]."""
        if not self.path:
            return self._called(x, "features", train=train, mask=mask)
        return self._called(x, train=train, mask=mask, stop_at=self.path)

    def head(self, features: Array) -> Array:
        """Logits [..., K] of features [..., F]."""

        def run(network: Any, features: Array) -> Array:
            if not self.path:
                return network.head(features)
            return dict(nnx.iter_modules(network))[self.path](features)

        of_user: Any = self.of_user
        return of_user(features, nnx_method=run)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits [B, K] of normalised images `x` [B, H, W, D] float32."""
        return self._called(x, train=train, mask=mask)

    def _called(self, x: Array, method: str = "__call__", **given: Any) -> Array:
        of_user: Any = self.of_user
        return of_user(x, nnx_method=functools.partial(_call, method=method, **given))


def build(
    network: nnx.bridge.ToLinen, num_classes: int, image_shape: tuple[int, int, int]
) -> AdaptedNnx:
    """The network, adapted to the images of a study.

    Args:
      network: the user's.
      num_classes: K.
      image_shape: (H, W, D) of the images.

    Raises:
      ConfigError: it cannot be applied to such images, has no head to be found, or has
        dropout, for which there are no random keys here.
    """
    network = network.clone(metadata_fn=None)  # variables are arrays
    made: Any = network.nnx_class
    name = getattr(made, "__name__", repr(made))
    seen: list[tuple[Path, str]] = []

    def run(key: Any, image: Array) -> Any:
        keys = {"params": key, "default": key}
        return network.init_with_output(keys, image, nnx_method=look)

    def look(module: nnx.Module, image: Array) -> Array:
        parts = list(nnx.iter_modules(module))
        for path, part in parts:
            if isinstance(part, nnx.Dropout):
                raise errors.ConfigError(
                    f"model = {name}: has dropout at {'.'.join(map(str, path))}: must"
                    " have none, as there are no random keys for it"
                )
        named = all(callable(getattr(module, one, None)) for one in _NAMES)
        if named:
            seen.append(((), "named"))
        place = {id(part): path for path, part in parts}
        outputs: list[tuple[Path, Any]] = []

        def watch(part: nnx.Module, call: Any, args: tuple, given: dict) -> Any:
            output = call(*args, **given)
            path = place.get(id(part), ())
            if path and len(args) == 1 and not given and jnp.ndim(args[0]) == 2:
                outputs.append((path, output))
            return output

        result = _call(module, image, train=False, mask=None, between=watch)
        seen.extend((path, "found") for path, output in outputs if output is result)
        return result

    image = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    try:
        jax.eval_shape(run, jax.random.key(0), image)
    except errors.ConfigError:
        raise
    except Exception as error:  # whatever the user's network raises
        raise errors.ConfigError(
            f"model = {name}: cannot be applied to images {image_shape}:"
            f" {type(error).__name__}: {errors.reason(error)}"
        ) from error
    if not seen:
        raise errors.ConfigError(
            f"model = {name}: must end in a layer from features [B, F] to logits, such"
            " as nnx.Linear, or have methods `features` and `head`"
        )
    return AdaptedNnx(network, num_classes, seen[0][0])


_NAMES = ("features", "head")


def _call(
    network: nnx.Module,
    x: Array,
    *,
    train: bool,
    mask: Array | None,
    method: str = "__call__",
    stop_at: Path = (),
    between: _Between | None = None,
) -> Array:
    """A network, or one of its methods, given what it takes.

    Args:
      network: it takes images, and `train` and `mask` if it names them. It is put into
        training or evaluation mode, as by its methods `train` and `eval`.
      x: normalised images [B, H, W, D].
      train: whether batch-norm uses the moments of the batch.
      mask: [B] bool, images that count in them; nnx's batch-norm gets it even where the
        network does not take it. None: all count.
      method: of the network.
      stop_at: the layer that lies there returns what it is given; (): none does.
      between: what is done in place of each layer's call; None: as above.
    """
    running = not train
    network.set_attributes(
        deterministic=running, use_running_average=running, raise_if_not_found=False
    )
    parts = dict(nnx.iter_modules(network))
    head = parts[stop_at] if stop_at else None

    def usual(part: nnx.Module, call: Any, args: tuple, given: dict[str, Any]) -> Any:
        if part is head:
            return args[0]
        if isinstance(part, nnx.BatchNorm) and mask is not None:
            shape = (len(mask), *[1] * (args[0].ndim - 1))
            given = {"mask": mask.reshape(shape)} | given
        return call(*args, **given)

    for path, part in parts.items():
        if path and callable(part):
            # nnx has no interception of calls: these are looked up in the class.
            part.__class__ = _watched(type(part))
    token = _between.set(between or usual)
    try:
        function = getattr(network, method)
        return function(x, **takes(function, train=train, mask=mask))
    finally:
        _between.reset(token)


@functools.cache
def _watched(cls: type[nnx.Module]) -> type[nnx.Module]:
    """The class, whose calls go through `_between`."""

    def call(self: Any, *args: Any, **given: Any) -> Any:
        inner: Any = super(watched, self)
        return _between.get()(self, inner.__call__, args, given)

    watched: Any = type(cls.__name__, (cls,), {"__call__": call})
    return watched
