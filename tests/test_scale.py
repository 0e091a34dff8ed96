"""What benchmarks.scale tells, by hand, and that its page is what was computed."""

import json
import pathlib

import jax
import pytest

from benchmarks import ahead_text, scale, timing
from mosaic_jax.core import trees
from mosaic_jax.core.costs import Counts, Loop
from mosaic_jax.run import memory
from mosaic_jax.run.placement import Placement

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_the_page_has_the_tables_that_were_computed():
    result = json.loads((timing.RESULTS / "scale.json").read_text())["result"]
    page = (DOCS / "scale.md").read_text()
    for table in scale.tables(result):
        assert table in page


def test_a_term_by_hand():
    term = scale.Term("images", "device", 5, 3, True, ("rounds",))
    assert term.bytes(10, 1) == 35
    assert term.bytes(10, 4) == 5 + 3 * 3  # the device with most of them
    whole = scale.Term("models", "device", 0, 2, False, ("generators",))
    assert whole.bytes(10, 4) == 20
    # The stages take turns.
    assert scale.needed([term, whole], 10, 1, "device") == 35


@pytest.mark.parametrize("name", ["FedAvg", "FedAvg, some a round"])
def test_images_are_those_on_a_device(name):
    study = scale.study_of(name, 12, **{"compute.devices": 4})
    divided, whole = next(
        (divided, size)
        for what, where, divided, _, size in scale.resident(study)
        if (what, where) == ("images", "device")
    )
    term = scale.Term("images", "device", 0, whole / 12, divided, ())
    placed = Placement(study)
    clients = placed.axis.place(study.data.clients, whole=memory.runs_anywhere(study))
    shards = [
        leaf.addressable_shards[0].data for leaf in jax.tree.leaves(clients.images)
    ]
    assert term.bytes(12, 4) == trees.num_bytes(shards)


def test_the_outermost_training_loop_is_the_step():
    inner = Loop(Counts(flops=1), trips=7, trains=True)
    outer = Loop(Counts(flops=10), (inner,), None, trains=True)
    program = Loop(Counts(flops=100), (Loop(Counts()), outer))
    assert scale.outermost(program).iteration().flops == 17
    alone = Loop(Counts(flops=3))
    assert scale.outermost(alone) is alone


def test_what_devices_tell_each_other_by_hand():
    text = """
ENTRY %main () -> f32[] {
  %a = f32[10]{0} parameter(0)
  %s = f32[10]{0} all-reduce(%a), to_apply=%add
  %t = (f32[10]{0}, bf16[4]{0}) all-reduce-start(%a, %a), to_apply=%add
  %g = f32[40]{0} all-gather(%s), dimensions={0}
  %h = (f32[10]{0}, f32[40]{0}) all-gather-start(%s), dimensions={0}
  %i = f32[40]{0} all-gather-done(%h)
  ROOT %p = f32[10]{0} collective-permute(%s)
}
"""
    found = ahead_text.read(text).total()
    assert found.summed == 4 * 10 + (4 * 10 + 2 * 4)
    assert found.exchanged == 4 * 40 + 4 * 40 + 4 * 10
