"""The patch and torch.compile. Backends run the traced graph as it is, so that results can be compared bit for bit."""

import copy

import pytest
import torch
import torch._dynamo

from common import expert


class CountingBackend:
    """Counts graphs made, and attention layers run: five in a call that computes, none in one that reuses."""

    def __init__(self):
        self.graphs = self.attentions = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        attentions = sum("scaled_dot_product_attention" in str(node.target) for node in graph.graph.nodes)

        def run(*args):
            self.attentions += attentions
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def from_scratch():
    """No graph of another test, and an error where Dynamo would give up on a frame with a warning."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gives_up = {"fail_on_recompile_limit_hit": True}  # since torch 2.6
    with torch._dynamo.config.patch(gives_up if hasattr(torch._dynamo.config, *gives_up) else {}):
        yield
    torch._dynamo.reset()


GRAPHS = pytest.mark.skipif(
    not expert.graphs_know_the_class(), reason="before torch 2.5 a model compiled as a whole runs uncompiled"
)


def compile_blocks(model, backend):
    pytest.importorskip("diffusers", "0.35")
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    return model


def compile_module(model, backend):
    model.compile(backend=backend)
    return model


def compile_wrapped(model, backend):
    return torch.compile(model, backend=backend)


@GRAPHS
@pytest.mark.parametrize(
    "compiled, order",
    [
        (compile_blocks, "cache first"),
        (compile_blocks, "compile first"),
        (compile_blocks, "compiled run first"),
        (compile_module, "cache first"),
        (compile_module, "compile first"),
        (compile_module, "compiled run first"),
        (compile_wrapped, "cache first"),
        (compile_wrapped, "compile first"),
    ],
)
def test_skipping_still_happens(model, euler, cached, compiled, order):
    """Every order gives, bit for bit, what caching gives without compilation, and the first run makes all the
    graphs."""
    eager = euler(copy.deepcopy(model))
    with cached(eager):
        results = [eager.run(**run) for run in ({}, {"cfg": True}, {"start": 4})]

    backend, sampler, handle = CountingBackend(), euler(model), None
    if order == "cache first":
        handle = cached(sampler)
    sampler.model = compiled(model, backend)
    if order == "compiled run first":
        sampler.run(steps=2)
    before, backend.attentions = backend.graphs, 0
    handle = handle or cached(sampler)

    assert torch.equal(sampler.run(), results[0])
    assert (handle.reports[-1].computed, handle.reports[-1].reused, backend.attentions) == (5, 7, 5 * 5)
    if compiled is compile_blocks:
        assert backend.graphs == 3 and not torch._dynamo.utils.counters["graph_break"]
    else:
        assert backend.graphs == before + 2  # with and without blocks
    first, backend.attentions = backend.graphs, 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(sampler.run(cfg=True), results[1])
        assert (handle.reports[-1].computed, handle.reports[-1].reused, backend.attentions) == (10, 14, 10 * 5)
        assert torch.equal(sampler.run(start=4), results[2])
    assert backend.graphs == first


def test_sizes_make_their_graphs_once(model, euler, cached):
    backend, counts = CountingBackend(), []
    sampler = euler(compile_blocks(model, backend))
    with cached(sampler), torch._dynamo.config.patch(automatic_dynamic_shapes=False):  # symbolic shapes trace slowly
        for seed in range(3):
            for run in ({}, {"size": 48}, {"steps": 7, "shift": 1.0}):
                sampler.run(**run, seed=seed)
            counts.append(backend.graphs)
    assert counts[0] == counts[2]


def test_cached_and_un_cached_runs_take_turns(model, euler, cached, calibrating):
    """As `--compare` does. A graph of one kind must not serve the other."""
    eager = euler(copy.deepcopy(model))
    plain = eager.run()
    with cached(eager):
        result = eager.run()

    backend = CountingBackend()
    sampler = euler(compile_module(model, backend))
    graphs = []
    for _ in range(3):
        assert torch.equal(sampler.run(), plain)
        with cached(sampler) as handle:
            assert torch.equal(sampler.run(), result)
            with handle.paused():
                assert torch.equal(sampler.run(), plain)
            assert torch.equal(sampler.run(), result) and handle.reports[-1].reused == 7
        with calibrating(sampler) as handle:
            assert torch.equal(sampler.run(), plain)
        assert handle.table.steps == 12
        graphs.append(backend.graphs)
    assert graphs[0] == graphs[2]


@pytest.mark.parametrize("compiled", [compile_module, compile_wrapped])
def test_where_graphs_do_not_know_the_class_the_model_runs_uncompiled(model, euler, cached, compiled, monkeypatch):
    """torch 2.4 gave a graph of the un-cached model to calls with stand-ins, and a wrong latent without a word."""
    monkeypatch.setattr(expert, "graphs_know_the_class", lambda: False)
    eager = euler(copy.deepcopy(model))
    plain = eager.run()
    with cached(eager):
        result = eager.run()
    backend, sampler = CountingBackend(), euler(model)
    sampler.model = compiled(model, backend)
    assert torch.equal(sampler.run(), plain) and backend.graphs > 0
    ran = backend.attentions
    with cached(sampler) as handle:
        assert torch.equal(sampler.run(), result) and backend.attentions == ran
        assert (handle.reports[-1].computed, handle.reports[-1].reused) == (5, 7)
        with handle.paused():
            assert torch.equal(sampler.run(), plain)
        assert torch.equal(sampler.run(), result)
    assert torch.equal(sampler.run(), plain) and backend.attentions >= ran


def test_a_compiled_run_after_an_exception(model, euler, cached):
    """Where the model fails inside a graph, in a step that computes (1) or reuses (2), the stand-ins go all the
    same."""
    sampler = euler(compile_wrapped(model, CountingBackend()))
    handle = cached(sampler)
    result, plain_class, keys = sampler.run(), type(model), set(model.__dict__)
    for step in (1, 2):
        for _ in sampler.iterate():
            if sampler.step == step - 1:
                break
        timestep = sampler.timesteps[step].expand(1) / 1000
        with pytest.raises((RuntimeError, TypeError)):  # Dynamo's, or PyTorch's own
            sampler.model(hidden_states=torch.zeros(1, 64, 3), timestep=timestep)
        assert handle.residuals.bytes == 0 and type(model) is plain_class and set(model.__dict__) == keys
        assert torch.equal(sampler.run(), result)


def test_calibration_of_a_compiled_model(model, euler, calibrating):
    eager = euler(copy.deepcopy(model))
    with calibrating(eager) as expected:
        eager.run(cfg=True)
    sampler = euler(compile_module(model, CountingBackend()))
    with calibrating(sampler) as handle:
        sampler.run(cfg=True)
    assert handle.table.mag_ratios == expected.table.mag_ratios
