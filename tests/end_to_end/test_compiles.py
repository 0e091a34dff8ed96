"""Each loop of a study is traced once and compiled once, whatever its windows."""

import collections
import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from mosaic_jax import server
from mosaic_jax.core.steps import ROUND
from mosaic_jax.run import methods, runner, settings, tracking
from tests import running, tiny

# Three windows of each loop, the last one shorter.
WINDOWS = {
    "init__rounds": 5,
    "finetune__rounds": 5,
    "evaluation__every": 2,
    "generators__steps": 5,
    "experts__local_steps": 5,
    "meta__steps": 5,
    "distill__steps": 5,
    "server__rounds": 5,
    "audit__images": 8,
    "audit__reference_steps": 5,
    "log__every_steps": 2,
}
SMALL = {
    "batch_size": 4,
    "latent_dim": 4,
    "width": 2,
    "pool": 2,
    "iterations": 1,
    "generator_steps": 1,
    "student_steps": 1,
}
EVENTS = ("jaxpr_trace_duration", "backend_compile_duration")


@contextlib.contextmanager
def counted(monkeypatch):
    """Counts what is traced and compiled under the name of each loop that runs.

    A program that comes from the cache on disk counts as compiled: it is one more.
    """
    found = collections.Counter()
    asked = collections.Counter()
    windows = collections.Counter()

    def listen(event, duration, fun_name="", **_):
        kind = event.rpartition("/")[2]
        if kind in EVENTS:
            found[kind, fun_name.removeprefix("jit(").removesuffix(")")] += 1

    begin, record = tracking.Progress.begin, tracking.Tracker.record

    def begins(self, stage, name, *args):
        asked[name] += 1
        begin(self, stage, name, *args)

    def records(self, stage, name, *args):
        windows[name] += 1
        record(self, stage, name, *args)

    jax.monitoring.register_event_duration_secs_listener(listen)
    monkeypatch.setattr(tracking.Progress, "begin", begins)
    monkeypatch.setattr(tracking.Tracker, "record", records)
    try:
        yield found, asked, windows
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def study(method, **changes):
    config = tiny.config(**WINDOWS | changes).to_dict()
    of_method = config["methods"].get(method, {})
    of_method |= {name: value for name, value in SMALL.items() if name in of_method}
    return methods.with_method(settings.from_mapping(config), method)


def check(counts, *, each=3):
    found, asked, windows = counts
    assert asked
    for name, count in asked.items():
        assert windows[name] == each * count, name
        measured = f"{name}_measure"
        for kind in EVENTS:
            assert found[kind, name] == count, (kind, name)
            assert found[kind, measured] == (name == ROUND) * count, (kind, name)


@pytest.fixture
def loops(monkeypatch):
    """Compiled text and number of donated arrays of each loop that runs."""
    found, jit = {}, jax.jit

    def watched(function, **options):
        program, compiled = jit(function, **options), {}
        if options.get("donate_argnames") != "states":
            return program

        def call(args, states, *others):
            if not compiled:
                compiled["program"] = program.lower(args, states, *others).compile()
                donated = len(jax.tree.leaves(states))
                found[function.__name__] = compiled["program"].as_text(), donated
            return compiled["program"](args, states, *others)

        return call

    monkeypatch.setattr(jax, "jit", watched)
    return found


def is_lean(text, donated):
    """Whether a program calls nothing on the host, and writes its state in place."""
    header = text.split("\n", 1)[0]
    calls = re.findall(r"infeed|outfeed|callback|send\(|recv\(", text)
    return not calls and header.count("-alias") >= donated


@pytest.mark.slow
def test_every_loop_of_mosaic(monkeypatch, tmp_path, loops):
    with counted(monkeypatch) as counts:
        runner.Experiment(study("mosaic"), tmp_path).run()
    assert loops.keys() == counts[1].keys()
    for name, (text, donated) in loops.items():
        assert is_lean(text, donated), name
    names = {"round", "gan", "local", "head", "student", "reference"}
    assert counts[1].keys() == names
    assert counts[1]["round"] == 2
    check(counts)


def test_what_is_not_lean_is_told():
    x = jnp.ones(3)

    def text(function, **options):
        return jax.jit(function, **options).lower(x).compile().as_text()

    def shown(x):
        jax.debug.print("{}", x)
        return x + 1

    assert is_lean(text(lambda x: x + 1, donate_argnums=0), 1)
    assert not is_lean(text(lambda x: x + 1), 1)
    assert not is_lean(text(shown, donate_argnums=0), 1)


ROUNDS_ONLY = {"finetune__rounds": 0}


# With a state, with a part of the network, with training on the server; of all others
# tests/stages/test_contracts.py checks that rounds keep the types of their state.
@pytest.mark.parametrize(
    "name",
    [
        "feddyn",
        *(pytest.param(name, marks=pytest.mark.slow) for name in server.METHODS),
    ],
)
def test_rounds_of_methods(name, monkeypatch, tmp_path):
    with counted(monkeypatch) as counts:
        runner.Experiment(study(name, **ROUNDS_ONLY), tmp_path).run()
    method = server.METHODS.get(name)
    once = method is not None and method.when == "once"
    gans = method is not None and method.asks_for_generators
    loops = {"round", *([name] if once else []), *(["gan"] if gans else [])}
    assert counts[1].keys() == loops
    check(counts)


@pytest.mark.slow
def test_on_several_devices(monkeypatch, tmp_path):
    config = study("fedavg", **ROUNDS_ONLY, compute__devices=2)
    with counted(monkeypatch) as counts:
        runner.Experiment(config, tmp_path).run()
    check(counts)


@pytest.mark.slow
def test_seeds_together_are_one_program(monkeypatch, tmp_path):
    config = study("fedavg", **ROUNDS_ONLY)
    works = [
        runner.Experiment(dataclasses.replace(config, seed=seed), tmp_path / str(seed))
        for seed in (0, 1)
    ]
    with counted(monkeypatch) as counts:
        runner.run_together(works)
    assert counts[1] == {"round": 1}
    check(counts, each=2 * 3)


def test_a_resumed_run_compiles_once_more(monkeypatch, tmp_path):
    config = study("fedavg", **ROUNDS_ONLY)
    with monkeypatch.context() as patch, counted(patch) as counts:
        running.stop_after(runner.Experiment(config, tmp_path), 1)
    check(counts, each=1)
    with counted(monkeypatch) as counts:
        runner.Experiment(config, tmp_path).run()
    check(counts, each=2)


@pytest.mark.slow
def test_rounds_with_states_in_host_memory(monkeypatch, tmp_path):
    config = study("fedbn", **ROUNDS_ONLY, compute__client_state="host")
    with counted(monkeypatch) as (found, asked, windows):
        runner.Experiment(config, tmp_path).run()
    assert (asked, windows) == ({"round": 1}, {"round": 3})
    for name in ("run_clients", "finish", "turnout", "evaluate"):
        assert found["backend_compile_duration", name] == 1, name
