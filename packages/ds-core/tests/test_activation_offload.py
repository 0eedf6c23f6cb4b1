"""Inputs of checkpointed blocks on the host: the same bits, bounded buffers, order, and errors."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import set_checkpoint_early_stop

import ds_core
from ds_core.activation_checkpointing import (
    HostOffload,
    Policy,
    RngStates,
    checkpoint,
    checkpoint_blocks,
    host_offload,
    store_inputs,
)
from ds_core.activation_checkpointing.buffer_pool import BufferPool
from ds_core.errors import ConfigError, DsError

#: One input of a block of `Net`.
INPUT_BYTES = 32 * 16 * 4


@pytest.fixture(autouse=True)
def a_device_of_its_own(monkeypatch):
    """Copies are made though device and host are the same memory here."""
    monkeypatch.setattr(host_offload, "needs_copies", lambda device: True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(0.3)

    def forward(self, x, mask=None, *, extra=()):
        x = x + self.dropout(self.down(torch.tanh(self.up(x))))
        for tensor in (mask, *extra):
            x = x if tensor is None else x * tensor
        return x


class Net(nn.Module):
    def __init__(self, blocks=6):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x, mask=None, extra=()):
        for block in self.blocks:
            x = block(x, mask, extra=extra)
        return x.float().square().mean()


def step(model, *inputs, autocast=False):
    """The loss, the gradients, and the random state afterwards."""
    torch.manual_seed(1)
    x = torch.randn(32, 16)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x, *inputs)
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters()], torch.get_rng_state()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("keep_last", [0, 1, 2, 100])
def test_offloaded_blocks_train_alike(keep_last, autocast):
    plain = step(Net(), autocast=autocast)
    model, offload = Net(), HostOffload(keep_last=keep_last)
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=offload))

    assert same(plain, step(model, autocast=autocast))

    sent = max(0, 6 - keep_last)
    assert offload.counts.num_sent == offload.counts.num_fetched == sent
    assert offload.counts.num_on_device == 6 - sent
    assert offload.counts.sent_bytes == offload.counts.fetched_bytes == sent * INPUT_BYTES


def test_buffers_are_bounded_and_used_again():
    model, offload = Net(), HostOffload(keep_last=1, max_free_buffers=3)
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=offload))

    for _ in range(3):
        step(model)

    buffers = offload.buffers
    assert buffers.used_bytes == 0
    assert buffers.held_bytes == 3 * INPUT_BYTES  # those that wait for the next step
    assert buffers.peak_bytes == 5 * INPUT_BYTES  # all blocks but the last one
    assert buffers.num_allocated == 5 + 2 * 2  # three of five are there from the step before


def test_each_block_is_fetched_while_the_one_after_is_computed(monkeypatch):
    model, order = Net(4), []
    offload = HostOffload(keep_last=1)
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=offload))
    for number, block in enumerate(model.blocks):
        original = block.up.forward

        def computed(x, number=number, original=original):
            order.append(f"compute {number}")
            return original(x)

        monkeypatch.setattr(block.up, "forward", computed)
    send, fetch, sent = HostOffload._send, HostOffload._fetch, []

    def send_noted(self, saved):
        sent.append(weakref.ref(saved))
        send(self, saved)

    def fetch_noted(self, saved):
        order.append(f"fetch {sent.index(weakref.ref(saved))}")
        fetch(self, saved)

    monkeypatch.setattr(HostOffload, "_send", send_noted)
    monkeypatch.setattr(HostOffload, "_fetch", fetch_noted)
    step(model)

    forward = [f"compute {number}" for number in range(4)]
    # The last block's input is there; before it is computed again, that of block 2 is asked for.
    backward = ["compute 3", "fetch 1", "compute 2", "fetch 0", "compute 1", "compute 0"]
    assert order == [*forward, "fetch 2", *backward]
    assert offload.counts.num_ahead == offload.counts.num_fetched == 3


def test_memory_on_the_device_is_freed_in_forward():
    alive = {}

    class Watched(Block):
        def forward(self, x, mask=None, *, extra=()):
            alive[len(alive)] = weakref.ref(x.untyped_storage())
            return super().forward(x, mask, extra=extra)

    model = Net(5)
    for block in model.blocks:
        block.__class__ = Watched
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=HostOffload(keep_last=2)))
    loss = model(torch.randn(32, 16))
    gc.collect()

    assert [ref() is not None for ref in alive.values()] == [False, False, False, True, True]
    loss.backward()


def test_small_tensors_and_parameters_stay():
    weight = nn.Parameter(torch.randn(64, 64))
    small, large = torch.ones(4, requires_grad=True), torch.ones(64, 64, requires_grad=True)
    offload = HostOffload(keep_last=0, min_bytes=17)
    policy = Policy(offload_to_cpu=offload)

    policy(lambda w, s, x: (x @ w).sin() * s[0].exp(), weight, small, large).sum().backward()

    assert offload.counts.num_sent == 1
    assert offload.counts.sent_bytes == large.nbytes


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT,
    "channels-last": lambda x: x.view(2, 3, 4, 10).to(memory_format=torch.channels_last),
    "sliced": lambda x: x[:, 1:7:2],
    "expanded": lambda x: x[:1].expand(40, 10, 24),
    "offset": lambda x: x[3:],
    "bool": lambda x: x > 0,
    "int64": lambda x: (x * 100).long(),
    "complex": lambda x: torch.complex(x, x),
    "bfloat16": lambda x: x.bfloat16(),
    "scalar": lambda x: x.sum(),
    "overlapping": lambda x: x.flatten().unfold(0, 5, 2),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_tensors_come_back_as_they_lay_in_memory(make):
    torch.manual_seed(0)
    tensor = make(torch.randn(10, 24))
    offload = HostOffload(keep_last=0, min_bytes=0)
    offload.begin_block()
    packed = offload.pack(tensor)

    back = offload.unpack(packed)

    assert offload.counts.num_sent == 1
    assert back.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    assert torch.equal(back, tensor)
    assert (back.shape, back.stride(), back.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
    assert torch.equal(offload.unpack(packed), tensor)  # again, as after retain_graph


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, dtype=torch.cfloat).conj(),
        lambda: torch.ones(3, 3).to_sparse(),
        lambda: nn.Parameter(torch.ones(3)),
        lambda: torch.empty(0, 4),
    ],
    ids=["conjugated", "sparse", "parameter", "empty"],
)
def test_other_tensors_are_left_alone(make):
    tensor = make()
    offload = HostOffload(keep_last=0, min_bytes=0)

    assert offload.unpack(offload.pack(tensor)) is tensor
    assert offload.counts.num_sent == 0


def test_a_mask_that_all_blocks_get_is_copied_once():
    mask, extra = torch.rand(32, 16), {"a": torch.rand(32, 16)}
    plain = step(Net(), mask, (extra["a"],))
    model, offload = Net(), HostOffload(keep_last=0)
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=offload))

    assert same(plain, step(model, mask, (extra["a"],)))
    assert offload.counts.num_sent == 6 + 2
    assert offload.counts.num_fetched == 6 + 2
    assert offload.counts.num_ahead == 5
    # Changed, it is another tensor.
    mask.mul_(2)
    changed = step(model, mask, (extra["a"],))
    assert offload.counts.num_sent == 2 * (6 + 2)
    assert same(changed, step(Net(), mask, (extra["a"],)))


def test_tensors_in_containers_and_other_arguments():
    x, y = torch.randn(20, 20, requires_grad=True), torch.randn(20, 20)

    def piece(pair, *, options, number, name=None):
        a, (b,) = pair
        return (a @ b).sin() * options["scale"] * number + options["none"]

    def call(run):
        options = {"scale": y, "none": 0.0}
        return torch.autograd.grad(run(piece, (x, [y]), options=options, number=3).sum(), x)[0]

    offload = HostOffload(keep_last=0)

    found = call(Policy(offload_to_cpu=offload))
    assert torch.equal(found, call(lambda fn, *a, **k: fn(*a, **k)))
    assert offload.counts.num_sent == 2  # x, and y which is there twice


def test_nested_checkpoints_store_the_outer_inputs_only():
    offload = HostOffload(keep_last=0)
    policy = Policy(offload_to_cpu=offload)
    x = torch.randn(20, 20, requires_grad=True)

    def outer(call, x):
        for _ in range(3):
            x = call(lambda y: nn.functional.dropout((y @ y).tanh(), 0.5), x)
        return x.exp()

    torch.manual_seed(0)
    plain = torch.autograd.grad(outer(lambda fn, y: fn(y), x).sum(), x)[0]
    torch.manual_seed(0)
    found = torch.autograd.grad(policy(outer, policy, x).sum(), x)[0]

    assert torch.equal(found, plain)
    assert offload.counts.num_sent == 1


def test_backwards_in_another_order_and_twice():
    model, plain = Net(3), Net(3)
    offload = HostOffload(keep_last=1)
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=offload))
    x, y = torch.randn(32, 16), torch.randn(32, 16)

    def losses(net):
        torch.manual_seed(3)
        first, second, dead = net(x), net(y), net(x)
        del dead  # a forward whose backward never comes
        first.backward(retain_graph=True)
        second.backward()
        first.backward()
        return [p.grad for p in net.parameters()]

    assert same(losses(plain), losses(model))
    gc.collect()
    assert offload.buffers.used_bytes == 0


def test_gradients_of_gradients():
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    policy = Policy(offload_to_cpu=HostOffload(keep_last=0, min_bytes=0))

    assert torch.autograd.gradgradcheck(lambda x: policy(lambda y: y.sin() * y, x), x)


@pytest.mark.parametrize("keep_last", [1, 2], ids=["when-sent", "when-used"])
def test_an_input_changed_in_place_is_an_error(keep_last):
    policy = Policy(offload_to_cpu=HostOffload(keep_last=keep_last))
    x = torch.ones(32, 16, requires_grad=True)
    one = x * 2
    out = policy(torch.sin, one)
    with torch.no_grad():
        one.mul_(3)
    out = policy(torch.cos, out)

    with pytest.raises(DsError, match=r"shape \[32, 16\], was changed in place"):
        out.sum().backward()


def test_an_input_changed_after_it_left_makes_no_difference():
    policy = Policy(offload_to_cpu=HostOffload(keep_last=0))
    x = torch.ones(32, 16, requires_grad=True)
    one = x * 2
    out = policy(torch.sin, one).sum()
    with torch.no_grad():
        one.zero_()

    out.backward()

    assert torch.equal(x.grad, 2 * torch.cos(2 * torch.ones(32, 16)))


def test_on_a_cpu_nothing_moves(monkeypatch):
    monkeypatch.undo()
    plain = step(Net())
    model, offload = Net(), HostOffload(keep_last=0)
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=offload))

    assert same(plain, step(model))
    assert offload.counts.num_sent == offload.buffers.num_allocated == 0
    one = torch.ones(400, requires_grad=True) * 2
    out = Policy(offload_to_cpu=offload)(torch.sin, one)
    with torch.no_grad():
        one.mul_(3)
    with pytest.raises(DsError, match="changed in place"):
        out.sum().backward()


def test_models_with_offload_can_be_copied_and_pickled():
    model = Net(2)
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=True))

    twin = copy.deepcopy(model)
    offload = pickle.loads(pickle.dumps(HostOffload(keep_last=5)))

    assert same(step(model), step(twin))
    assert offload._keep_last == 5
    assert (
        Policy(offload_to_cpu=True).storage._offload is Policy(offload_to_cpu=True).storage._offload
    )


def test_settings_below_zero_are_refused():
    with pytest.raises(DsError, match="keep_last: got -1, expected 0 or more"):
        HostOffload(keep_last=-1)


def test_a_pool_takes_buffers_back_while_it_gives_one_out():
    first = []

    def allocate(num_bytes):
        if first:
            pool.give(first.pop())  # as when Python ends an owner just now
        return torch.empty(num_bytes, dtype=torch.uint8)

    pool = BufferPool(allocate, 2)
    first.append(pool.take(8))
    pool.take(16)

    assert pool.take(8).numel() == 8
    assert pool.num_allocated == 2
    assert pool.used_bytes == 24


# ------------------------------------------------------------------------------------- streams


class LateStream:
    """Does what is queued on it only when somebody waits for an event behind it."""

    def __init__(self, device):
        self.device, self.queue, self.done, self.waits = device, [], 0, 0
        self.current = None

    def __enter__(self):
        LateStream.current = self

    def __exit__(self, *error):
        LateStream.current = None

    def wait_stream(self, other):
        self.waits += 1

    def record_event(self):
        return self, len(self.queue)

    def wait_event(self, event):
        stream, end = event
        for copy_now in stream.queue[stream.done : end]:
            copy_now()
        stream.done = max(stream.done, end)


@pytest.fixture
def late_stream(monkeypatch):
    """A side stream as late as it may be; memory that was not written to yet is full of NaN."""
    side = LateStream(torch.device("cpu"))

    def queue_copy(target, source):
        target.fill_(float("nan"))
        LateStream.current.queue.append(lambda: target.copy_(source))

    monkeypatch.setattr(HostOffload, "_stream", lambda self, device: side)
    monkeypatch.setattr(host_offload, "_copy", queue_copy)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: side)
    return side


@pytest.mark.parametrize("keep_last", [0, 1, 2])
def test_nobody_reads_before_a_copy_is_done(late_stream, keep_last):
    model, offload = Net(), HostOffload(keep_last=keep_last)
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=offload))
    mask = torch.rand(32, 16)

    for _ in range(3):
        assert same(step(Net(), mask), step(model, mask))

    assert late_stream.waits == offload.counts.num_sent + offload.counts.num_fetched
    # Those that are under way when backward begins are still on the device.
    assert offload.counts.num_fetched < offload.counts.num_sent
    assert offload.counts.num_on_device > 3 * keep_last


def test_copies_under_way_keep_two_blocks_on_the_device(late_stream):
    model, offload = Net(8), HostOffload(keep_last=1)
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=offload))
    held = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: held.append(len(offload._leaving)))

    loss = model(torch.randn(32, 16))

    assert held == [0, 1, 2, 2, 2, 2, 2, 2]
    assert late_stream.done == 5  # of 7 that were sent: what comes after waits for no more
    loss.backward()


def test_a_graph_that_is_dropped_waits_for_what_it_had_asked_for(late_stream):
    offload = HostOffload(keep_last=0)
    policy = Policy(offload_to_cpu=offload)
    x = torch.randn(32, 16, requires_grad=True)
    first = policy(torch.sin, x)
    middle = [policy(torch.cos, first)]
    for _ in range(4):
        middle.append(policy(torch.cos, middle[-1]))

    torch.autograd.grad(middle[-1].sum(), middle[-4])  # the block before was asked for too
    pending = len(late_stream.queue) - late_stream.done
    del middle, first

    assert pending > 0
    assert late_stream.done == len(late_stream.queue)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
@pytest.mark.parametrize("keep_last", [0, 1])
def test_an_accelerator_copies_beside_its_compute(keep_last):
    device = torch.accelerator.current_accelerator()

    def train(offload):
        model = Net().to(device)
        states = RngStates(device)
        states.add("apart", 3)

        def dropped(x, forward):
            with states.fork("apart"):
                return nn.functional.dropout(forward(x), 0.1)

        for block in model.blocks:
            block.down.forward = functools.partial(dropped, forward=block.down.forward)
        checkpoint_blocks(model, policy=Policy(offload_to_cpu=offload))
        torch.manual_seed(1)
        x = torch.randn(4096, 16, device=device)
        for _ in range(3):
            model(x).backward()
        return [p.grad.cpu() for p in model.parameters()]

    offload = HostOffload(keep_last=keep_last)

    assert same(train(False), train(offload))
    assert offload.counts.num_fetched > 0
    assert offload.buffers.used_bytes == 0


# ------------------------------------------------------------------------------ torch.compile


# Dynamo hides this warning of its own, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("compiled", ["inside", "outside"])
def test_compiled_blocks_are_offloaded(compiled):
    plain, model, offload = step(Net(2)), Net(2), HostOffload(keep_last=0)
    if compiled == "inside":
        for block in model.blocks:
            block.down.forward = torch.compile(block.down.forward, backend="aot_eager")
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=offload))
    if compiled == "outside":
        for block in model.blocks:
            block.forward = torch.compile(block.forward, backend="aot_eager")

    found = step(model)

    assert offload.counts.num_sent == 2
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_early_stopping():
    plain, model = step(Net(3)), Net(3)
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=HostOffload(keep_last=0)))

    with set_checkpoint_early_stop(False):
        assert same(plain, step(model))


# ---------------------------------------------------------------- models that checkpoint themselves


class Layer(Block):
    """As transformers writes them: keyword arguments are bound, positional ones are saved."""

    gradient_checkpointing = False

    def __call__(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training:
            run = super().__call__
            return self._gradient_checkpointing_func(lambda *a: run(*a, **kwargs), *args)
        return super().__call__(*args, **kwargs)


class TheirModel(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(16, 16)
        for layer in self.inner:
            layer.gradient_checkpointing = reentrant is not None
            layer._gradient_checkpointing_func = lambda fn, *args: torch_checkpoint(
                fn, *args, use_reentrant=reentrant
            )

    def forward(self, x, mask=None):
        x = self.head(x)
        for layer in self.inner:
            x = layer(x, mask)
        return self.head(x).square().mean()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_models_own_checkpoints_are_offloaded(reentrant):
    plain = step(TheirModel(None), torch.rand(32, 16, generator=torch.Generator().manual_seed(0)))
    model, offload = TheirModel(reentrant), HostOffload(keep_last=0)
    before = [layer._gradient_checkpointing_func for layer in model.inner]
    mask = torch.rand(32, 16, generator=torch.Generator().manual_seed(0))

    with store_inputs(model, Policy(offload_to_cpu=offload)) as stored:
        found = step(model, mask)

    assert same(plain, found)
    assert stored.names == ("inner.0", "inner.1", "inner.2", "inner.3")
    assert offload.counts.num_sent == 4 + 1  # hidden states, and the mask once: nothing of the head
    assert offload.counts.num_ahead == 3
    assert [layer._gradient_checkpointing_func for layer in model.inner] == before


def test_backward_may_come_after_the_context_and_evaluation_is_plain():
    model, offload = TheirModel(False), HostOffload(keep_last=0)
    x = torch.randn(32, 16)
    with store_inputs(model, Policy(offload_to_cpu=offload)):
        loss = model(x)
        with torch.no_grad():
            model(x)
    model(x)  # outside: not offloaded

    loss.backward()

    assert offload.counts.num_sent == offload.counts.num_fetched == 4


def test_models_that_do_not_checkpoint_say_why():
    with pytest.raises(DsError, match="no module of Net checkpoints"):
        store_inputs(Net())
    with pytest.raises(DsError, match="leaves inputs where they are"):
        store_inputs(TheirModel(False), Policy())


def test_named_random_states_in_a_models_own_checkpoints():
    states = RngStates("cpu")
    states.add("apart", 9)

    def drop(x):
        with states.fork("apart"):
            return nn.functional.dropout(x.sin(), 0.5).exp()

    def run(model):
        states.load_state_dict(fresh)
        model.inner[0].dropout.forward = model.inner[2].dropout.forward = drop
        return [*step(model), states.state_dict()["apart"]]

    fresh = states.state_dict()
    model = TheirModel(False)
    with store_inputs(model):
        assert same(run(TheirModel(None)), run(model))


# ----------------------------------------------------------------------------------- by the config


def train(model, section, backend=None):
    engine = ds_core.initialize(
        model,
        {
            "train_micro_batch_size_per_gpu": 32,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "activation_checkpointing": section,
        },
    )
    if backend is not None:
        engine.compile(backend=backend)
    offloads = [each.offload for each in engine._observers if hasattr(each, "offload")]
    torch.manual_seed(1)
    losses = []
    for _ in range(4):
        engine.backward(loss := engine(torch.randn(32, 16)))
        engine.step()
        losses.append(loss.item())
    engine.close()
    return losses, offloads[0].counts if offloads and offloads[0] else None


def test_the_section_offloads(caplog):
    plain, _ = train(Net(), {})
    with caplog.at_level("INFO"):
        losses, counts = train(Net(), {"blocks": "repeated", "cpu_checkpointing": True})

    assert losses == plain
    # The last block's input stays until a next one comes; its backward was before.
    assert counts.num_sent == counts.num_fetched == 4 * 5
    assert "MiB of host memory" in caplog.text


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("offloads", [False, True])
def test_blocks_are_compiled_whether_or_not_they_are_offloaded(offloads):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    plain, _ = train(Net(2), {})
    section = {"blocks": "repeated", "cpu_checkpointing": offloads}

    losses, counts = train(Net(2), section, backend)

    assert losses == pytest.approx(plain)
    assert graphs
    assert counts is None or counts.num_sent == 4


def test_the_section_offloads_what_a_model_checkpoints_itself():
    plain, _ = train(TheirModel(None), {})

    losses, counts = train(TheirModel(False), {"blocks": "own", "cpu_checkpointing": True})

    assert losses == plain
    assert counts.num_sent == counts.num_fetched == 4 * 3
    with pytest.raises(ConfigError, match="no module of Net checkpoints"):
        train(Net(), {"blocks": "own", "cpu_checkpointing": True})


def test_checkpoint_alone_draws_named_states_in_nested_calls_as_a_plain_run():
    def run(call):
        torch.manual_seed(0)
        states = RngStates("cpu")
        states.add("apart", 9)

        def inner(x):
            with states.fork("apart"):
                return nn.functional.dropout(x.sin(), 0.5).exp()

        def outer(x):
            with states.fork("apart"):
                x = nn.functional.dropout(x, 0.2)
            return call(inner, call(inner, x)) + x

        x = torch.ones(50, requires_grad=True)
        call(outer, call(outer, x)).sum().backward()
        return x.grad, states.state_dict()["apart"]

    assert same(run(lambda fn, x: fn(x)), run(checkpoint))
