"""Compiled programs for devices that are not here, and what their text tells."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import ahead_text
from mosaic_jax.core import steps
from mosaic_jax.core.costs import Counts

ROOT = pathlib.Path(__file__).parents[1]
PLUGINS = {"h100": "jax_plugins.xla_cuda12", "v5e": "libtpu"}

# A loop of ten steps in a loop whose length is not known, as compiled for a GPU.
GPU = """
HloModule jit_f, is_scheduled=true

%scaled (p.0: f32[50,100], p.1: s32[]) -> f32[100] {
  %p.0 = f32[50,100]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %row = f32[1,100]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,100}
  %flat = f32[100]{0} bitcast(%row)
  ROOT %twice = f32[100]{0} add(%flat, %flat)
}

%stored (p.2: f32[50,100], p.3: f32[1,100], p.4: s32[]) -> f32[50,100] {
  %p.2 = f32[50,100]{1,0} parameter(0)
  %p.3 = f32[1,100]{1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  ROOT %update = f32[50,100]{1,0} dynamic-update-slice(%p.2, %p.3, %p.4, %p.4)
}

%inner_test (t.0: (s32[], f32[50,100])) -> pred[] {
  %t.0 = (s32[], f32[50,100]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t.0), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%n, %ten), direction=LT
}

%inner (t.1: (s32[], f32[50,100])) -> (s32[], f32[50,100]) {
  %t.1 = (s32[], f32[50,100]{1,0}) parameter(0)
  %m = s32[] get-tuple-element(%t.1), index=0
  %x = f32[50,100]{1,0} get-tuple-element(%t.1), index=1
  %gemm = (f32[50,100]{1,0}, s8[0]{0}) custom-call(%x, %x), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %y = f32[50,100]{1,0} get-tuple-element(%gemm), index=0
  %a = f32[100]{0} fusion(%y, %m), kind=kLoop, calls=%scaled
  %b = f32[1,100]{1,0} bitcast(%a)
  %z = f32[50,100]{1,0} fusion(%y, %b, %m), kind=kLoop, calls=%stored
  ROOT %out = (s32[], f32[50,100]{1,0}) tuple(%m, %z)
}

%outer_test (t.2: (s32[], f32[50,100], /*index=2*/s32[])) -> pred[] {
  %t.2 = (s32[], f32[50,100]{1,0}, /*index=2*/s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t.2), index=0
  %e = s32[] get-tuple-element(%t.2), index=2
  ROOT %more = pred[] compare(%i, %e), direction=LT
}

%outer (t.3: (s32[], f32[50,100], /*index=2*/s32[])) -> (s32[], f32[50,100], s32[]) {
  %t.3 = (s32[], f32[50,100]{1,0}, /*index=2*/s32[]) parameter(0)
  %j = s32[] get-tuple-element(%t.3), index=0
  %u = f32[50,100]{1,0} get-tuple-element(%t.3), index=1
  %k = s32[] get-tuple-element(%t.3), index=2
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %in = (s32[], f32[50,100]{1,0}) tuple(%start, %u)
  %loop = (s32[], f32[50,100]{1,0}) while(%in), condition=%inner_test, body=%inner, \
metadata={op_name="jit(f)/while/body/vmap(training)/while"}TRIPS
  %v = f32[50,100]{1,0} get-tuple-element(%loop), index=1
  ROOT %o = (s32[], f32[50,100]{1,0}, s32[]) tuple(%j, %v, %k)
}

ENTRY %main (q: f32[50,100], end: s32[]) -> f32[50,100] {
  %q = f32[50,100]{1,0} parameter(0)
  %end = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %first = (s32[], f32[50,100]{1,0}, s32[]) tuple(%zero.1, %q, %end)
  %w = (s32[], f32[50,100]{1,0}, s32[]) while(%first), condition=%outer_test, \
body=%outer, metadata={op_name="jit(f)/while"}
  ROOT %r = f32[50,100]{1,0} get-tuple-element(%w), index=1
}
"""
KNOWN = ', backend_config={"known_trip_count":{"n":"10"}}'


@pytest.mark.parametrize("told", [KNOWN, ""])
def test_loops_kernels_and_bytes_by_hand(told):
    program = ahead_text.read(GPU.replace("TRIPS", told))
    assert program.own == Counts()
    (outer,) = program.loops
    (inner,) = outer.loops
    assert (outer.trips, outer.trains) == (None, False)
    # Without the note, by the counter's start and the bound.
    assert (inner.trips, inner.trains) == (10, True)
    matrix, row, number = 4 * 50 * 100, 4 * 100, 4
    moved = 3 * matrix  # the product
    moved += row + number + row  # one row is read, another one written
    moved += row + number + row
    moved += 2 * number + 1  # the test
    assert inner.own == Counts(4, moved, 2 * 50 * 100 * 100)
    assert program.total(unknown=3).flops == 3 * 10 * 2 * 50 * 100 * 100


def of_one(text):
    """Counts of a program whose entry is `text`."""
    return ahead_text.read(f"ENTRY %main () -> f32[] {{\n{text}}}\n").total()


def test_convolutions_of_a_gpu():
    """Each of the three has the FLOPs of the forward convolution."""
    shapes = {
        "x": "bf16[8,32,32,16]{3,2,1,0}",
        "w": "bf16[32,3,3,4]{3,2,1,0}",  # four groups
        "y": "bf16[8,16,16,32]{3,2,1,0}",
    }
    given = "".join(f"  %{n} = {t} parameter(0)\n" for n, t in shapes.items())
    for kind, operands, result in (
        ("Forward", "%x, %w", "y"),
        ("BackwardInput", "%y, %w", "x"),
        ("BackwardFilter", "%x, %y", "w"),
    ):
        found = of_one(
            f"{given}  ROOT %c = ({shapes[result]}, u8[9]{{0}})"
            f" custom-call({operands}),"
            " window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f,"
            f' feature_group_count=4, custom_call_target="__cudnn$conv{kind}"\n'
        )
        assert found.flops == 2 * 8 * 16 * 16 * 32 * 9 * 4, kind


def test_memory_of_a_tpu():
    found = of_one(
        "  %a = bf16[10,130]{1,0:T(8,128)(2,1)} parameter(0)\n"
        "  %b = f32[64]{0:T(128)S(1)} parameter(1)\n"
        "  %s = (bf16[10,130]{1,0:T(8,128)(2,1)S(1)}, bf16[10,130]{1,0:T(8,128)(2,1)},"
        " u32[]{:S(2)}) copy-start(%a)\n"
        "  %d = bf16[10,130]{1,0:T(8,128)(2,1)S(1)} copy-done(%s)\n"
        "  ROOT %e = f32[64]{0:T(128)S(1)} add(%b, %b), backend_config="
        '{"window_config":{"estimated_cycles":"123"}}\n'
    )
    # Whole tiles are read, and what stays in the core is not moved.
    assert found == Counts(2, 2 * 16 * 256, 0, 123)


def test_a_program_compiled_here():
    def run(x, count):
        def step(i, x):
            return jnp.tanh(x @ x)

        return jax.lax.fori_loop(0, count, lambda i, x: steps.train(0, 7, step, x), x)

    compiled = jax.jit(run).lower(jnp.ones((64, 64)), 3).compile()
    program = ahead_text.read(compiled.as_text())
    (outer,) = program.loops
    (inner,) = outer.loops
    assert (outer.trips, inner.trips, inner.trains) == (None, 7, True)
    assert inner.iteration().kernels >= 2


@pytest.mark.parametrize("devices", ["1", "4"])
@pytest.mark.parametrize("target", PLUGINS)
def test_a_small_study_compiles_ahead(target, devices, tmp_path):
    try:
        found = importlib.util.find_spec(PLUGINS[target])
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"no compiler for {target}: make ahead")
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.ahead", "--target", target,
            "--config", "digits_mosaic", "--devices", devices, "--stages",
            "init,generators", "--dump", str(tmp_path), "--set", "model.name=cnn",
            "--set", "model.width=2", "--set", "generators.width=2",
            "--set", "data.num_clients=4",
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {line.split(" | ")[0]: line for line in done.stdout.splitlines()}
    for loop in ("| init round", "| generators gan"):
        kernels, moved, flops = map(float, rows[loop].split(" | ")[2:5])
        assert kernels > 10 and moved > 0 and flops > 0
    text = (tmp_path / "init_round.txt").read_text()
    # The state is updated in place, and no step waits for the host.
    assert "input_output_alias={ {" in text
    for word in ("infeed", "outfeed", "host_callback", "python_cpu_callback"):
        assert word not in text
    if devices == "4":
        assert "all-reduce" in text
