"""Which devices programs are traced for, and programs that are told but not run."""

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import programs


def test_the_platform_is_that_of_the_target():
    assert programs.platform() == jax.default_backend()
    with programs.traced_for("gpu"):
        assert programs.platform() == "gpu"
        with programs.traced_for(programs.Target("tpu", memory=5)):
            assert (programs.platform(), programs.target().memory) == ("tpu", 5)
        assert programs.platform() == "gpu"
    assert programs.target() is None


def test_programs_run_unless_they_are_recorded():
    def double(x):
        return 2 * x

    assert programs.jit(double)(3) == 6
    told = []

    def recorder(program, args, named):
        told.append((program.trace(*args, **named).out_info.shape, named))
        return np.zeros(3)

    with programs.recorded(recorder):

        @programs.jit
        def ruin(x, y):
            jax.debug.callback(lambda: told.append("it ran"))
            return x + y

        result = ruin(jnp.ones(3), y=jnp.ones(()))
    assert result.tolist() == [0, 0, 0]
    assert told == [((3,), {"y": told[0][1]["y"]})]
    assert programs.jit(double)(3) == 6
