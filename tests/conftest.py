"""Four devices; programs compile fast, not run fast, and are kept between runs."""

import gc
import importlib.metadata
import os
import pathlib
import signal

# Read when jax starts, here and in the processes that tests launch.
_FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_force_host_platform_device_count=4",
]
# Its older emitters compile two to three times as fast, and each worker has one core;
# later versions may not have these, and end at a flag that they do not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
    _FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

# Faults that jax can see: arrays of unlike rank that meet by accident, and a random key
# drawn from twice.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DEBUG_KEY_REUSE"] = "1"

# A shell starts what runs in its background with SIGINT ignored, nohup with SIGHUP, and
# programs that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import jax

# Looking through all that JAX keeps in its caches took a tenth of the time.
gc.set_threshold(100_000, 50, 100)

_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
