"""Decoder layers as CUDA graphs: the kernels of a layer's forward and backward, launched by one call each.

The third step of a shape is recorded layer by layer as it runs, every forward in the order of the layers
and every backward in the opposite order, into one pool of memory; later steps of that shape replay it. Recorded in the
order of a step, a layer's kept tensors and temporaries take the same places in the pool that they would take eagerly.
So a replay is right only in that order too, with nothing of another shape in between; whatever comes otherwise runs
eagerly, and so does every call that is no training pass on plain tensors. Both run the same kernels on the same
operands, dropout's seeds are drawn outside and copied in, so both give the same bits where the kernels repeat theirs.
One kernel may differ: cuDNN's attention, which has to plan for every shape, runs in recordings alone, and not under
torch's deterministic algorithms.

A replay writes a layer's parameter gradients where it wrote them the last time. A gradient that is still the
parameter's `.grad` then (gradient accumulation) is moved away first; what else keeps one has to clone it.
"""

import gc
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmpeft_fast.layers.reading import LayerSites
from mmpeft_fast.layers.sites import has_hooks, is_recorded, recorded_key
from mmpeft_fast.ops.autocast import autocast_dtype
from mmpeft_fast.ops.flash import repeated_shapes
from mmpeft_fast.ops.packed import PackedWeight
from mmpeft_fast.ops.providers import forced_provider

_logger = logging.getLogger(__name__)
_MOST_SHAPES = 8
# Shapes that are remembered as seen once.
_MOST_SEEN = 256
# After so many recordings that did not fit any more, a shape is not recorded again.
_MOST_RESTARTS = 4


class Inputs(NamedTuple):
    """What a layer is given at a call; all else that it computes with are its own parameters.

    x [B, T, H]; cos, sin [B or 1, T, DH]; mask [B or 1, 1, T, T] or None (causal); seed of the dropout masks, 0-dim
    int64, or None; prefix_k, prefix_v [HK, P, DH] or None.
    """

    x: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    seed: Tensor | None = None
    prefix_k: Tensor | None = None
    prefix_v: Tensor | None = None

    @property
    def prefix(self) -> tuple[Tensor, Tensor] | None:
        return None if self.prefix_k is None else (self.prefix_k, self.prefix_v)


# The same tensor for many layers: it is copied in once.
_SHARED = ("cos", "sin", "mask")


class Recording(Protocol):
    """outputs: of the recorded function; `replay` writes them anew."""

    outputs: Sequence[Tensor | None]

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Where graphs are recorded; a test has one of its own."""

    def record(self, function: Callable[[], Sequence[Tensor | None]]) -> Recording:
        """Calls the function, whose outputs hold nothing before the first replay."""

    def synchronize(self) -> None: ...


class CudaRecorder:
    """CUDA graphs of one device that share a pool of memory and a stream: autograd runs a recorded backward on the
    stream of its forward."""

    def __init__(self, device: torch.device):
        self._device = device
        with torch.cuda.device(device):
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(self, function: Callable[[], Sequence[Tensor | None]]) -> Recording:
        with torch.cuda.device(self._device), _without_collection():
            current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                # Other threads (a data loader's) may allocate meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    outputs = function()
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    _end_capture_of_generator()
                    raise
                graph.capture_end()
            current.wait_stream(self._stream)
        return _CudaRecording(graph, outputs)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


class _CudaRecording:
    def __init__(self, graph: "torch.cuda.CUDAGraph", outputs: Sequence[Tensor | None]):
        self.outputs, self.replay = outputs, graph.replay


@contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage is collected inside: what frees CUDA's objects would break the recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _end_capture_of_generator() -> None:
    """After a capture that failed, torch's generator still believes to be in it, and every later draw fails."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def recorder_for(device: torch.device) -> Recorder | None:
    return CudaRecorder(device) if device.type == "cuda" else None


class _Read(NamedTuple):
    """What a layer computes with: its sites, as their tensors and everything else (scalings, dropout, names), and its
    other settings."""

    sites: LayerSites
    tensors: tuple[Tensor, ...]
    rest: tuple

    @property
    def trained(self) -> list[Tensor]:
        return list({id(tensor): tensor for tensor in self.tensors if tensor.requires_grad}.values())

    def addresses(self) -> tuple:
        """Where a recording of this layer reads, and what it differentiates."""
        return tuple((tensor.data_ptr(), tensor.requires_grad) for tensor in self.tensors)


def _mapped(part, function: Callable[[Tensor], Tensor]):
    """Named tuples, tuples and lists with every tensor replaced."""
    if isinstance(part, Tensor):
        return function(part)
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(_mapped(inner, function) for inner in part))
    if isinstance(part, tuple | list):
        return type(part)(_mapped(inner, function) for inner in part)
    return part


def _read(sites: LayerSites, settings: tuple) -> _Read:
    tensors: list[Tensor] = []
    rest: list = [settings]

    def walk(part) -> None:
        if isinstance(part, Tensor):
            tensors.append(part)
            rest.append((part.shape, part.dtype, part.stride()))
        elif isinstance(part, tuple | list):
            rest.append(len(part))
            for inner in part:
                walk(inner)
        elif isinstance(part, PackedWeight):
            rest.append(part)
            walk(part.tensors)
        else:
            rest.append(part)

    walk(sites)
    return _Read(sites, tuple(tensors), tuple(rest))


class _Slot:
    """Memory that recordings read an input from, and what was last copied there."""

    def __init__(self, given: Tensor, *, borrowed: bool = False):
        self.static = (given if borrowed else given.clone()).detach().requires_grad_(given.requires_grad)
        self.is_borrowed = borrowed
        self._remember(given)

    def holds(self, given: Tensor) -> bool:
        if self.is_borrowed:
            return given.data_ptr() == self.static.data_ptr()
        return given is self._source and given._version == self._version

    def bring(self, given: Tensor) -> None:
        # `.data` has a version counter of its own: a recorded forward's kept tensors stay valid to autograd.
        self.static.data.copy_(given)
        self._remember(given)

    def _remember(self, given: Tensor) -> None:
        # Not what belongs to an autograd graph, which would live as long.
        self._source, self._version = (None, -1) if given.requires_grad else (given, given._version)


class _Chain:
    """The recordings of one shape, in the order in which a step runs them."""

    def __init__(self, device: torch.device, release: Callable[[], None]):
        self.device = device
        self._release = release  # waits until no graph runs: one that does cannot be taken away
        self.graphs: weakref.WeakKeyDictionary[nn.Module, _Graph] = weakref.WeakKeyDictionary()
        self.slots: dict[str, list[_Slot]] = {name: [] for name in _SHARED}
        self.addresses: set[int] = set()  # of tensors that recordings write and the next ones read
        self.num_backwards, self.may_record_backwards = 0, True
        self._first: int | None = None  # the place of the layer that a step begins with
        self._rounds = self._restarts = 0
        self.is_recording = False

    @property
    def is_given_up(self) -> bool:
        return self._restarts > _MOST_RESTARTS

    def takes(self, place: int) -> bool:
        """Whether the layer at `place` is to be recorded now: in the third step, if its turn has not passed."""
        if self._first is None or place < self._first:
            self._first, self._rounds, self.is_recording = place, 0, False
            self.clear()
        if place == self._first:
            self._rounds += 1
            self.is_recording = self._rounds == 3
        return self.is_recording

    @property
    def plans(self) -> bool:
        """Whether this is the step before the recorded one: in a first call libraries make plans for a shape, and
        allocate, which no recording can hold."""
        return self._rounds == 2

    def clear(self) -> None:
        if self.graphs:
            self._release()
        self.graphs.clear()
        self.addresses.clear()
        for slots in self.slots.values():
            slots.clear()
        self.num_backwards, self.may_record_backwards = 0, True

    def restart(self, *, for_room: bool = False) -> None:
        """Forgets the recordings; the next step of this shape records anew."""
        self.clear()
        self._rounds, self.is_recording = 2, False
        self._restarts += not for_room

    def slot(self, name: str, given: Tensor) -> _Slot:
        """The shared slot that holds this tensor, a new one where none does."""
        for slot in self.slots[name]:
            if slot.holds(given):
                return slot
        self.slots[name].append(_Slot(given))
        return self.slots[name][-1]


class _Pass:
    """One forward through a recording whose backward has not run yet; lives as long as autograd keeps it."""

    def __init__(self, graph: "_Graph", graphs: "LayerGraphs"):
        self.graph, self._graphs = graph, graphs
        self.is_done = self.is_overwritten = False

    def backward(self, dy: Tensor) -> list[Tensor | None]:
        if self.is_done or self.is_overwritten:
            what = "a second time" if self.is_done else "after that of a layer before it"
            raise RuntimeError(
                f"the backward of a layer that was replayed as a CUDA graph ran {what}, when its memory held something "
                "else already; expected one backward, the last layer first (fuse(model, cuda_graphs=False) allows it)"
            )
        for other in self._graphs.open_passes():
            if other.graph.chain is self.graph.chain and other.graph.index > self.graph.index:
                other.is_overwritten = True
        self.is_done = True
        return self.graph.backward(dy)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, replayed: _Pass, *tensors):
        ctx.replayed = replayed
        return replayed.graph.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return None, *ctx.replayed.backward(dy)


class _Graph:
    """A layer's recordings for inputs of one kind."""

    def __init__(self, chain: _Chain, recorder: Recorder, read: _Read, inputs: Inputs, compute: Callable):
        self.index, self.chain, self._recorder = len(chain.graphs), chain, recorder
        self._read, self._addresses, self._kinds = read, read.addresses(), _kinds(inputs)
        self._slots = [
            None if given is None
            else chain.slot(name, given) if name in _SHARED
            else _Slot(given, borrowed=given.data_ptr() in chain.addresses)
            for name, given in zip(Inputs._fields, inputs, strict=True)
        ]  # fmt: skip
        static = Inputs(*(None if slot is None else slot.static for slot in self._slots))
        self.differentiated = [i for i, given in enumerate(static) if given is not None and given.requires_grad]
        self.trained = read.trained
        leaves = {id(parameter): _leaf(parameter) for parameter in self.trained}
        recorded_sites = _mapped(read.sites, lambda tensor: leaves.get(id(tensor), tensor))
        self._wanted = [*(static[i] for i in self.differentiated), *leaves.values()]
        self._y: Tensor | None = None  # with the recorded forward's autograd graph, until its backward is recorded
        self._dy: _Slot | None = None
        self._backward: Recording | None = None

        def run() -> tuple[Tensor]:
            self._y = compute(recorded_sites, static)
            return (self._y,)

        with _as_recorded(), repeated_shapes():
            self._forward = recorder.record(run)
        (y,) = self._forward.outputs
        chain.addresses.add(y.data_ptr())

    def fits(self, read: _Read, inputs: Inputs) -> bool:
        """Whether the layer and the kind of its inputs are as they were recorded."""
        same = read is self._read or read.rest == self._read.rest
        return same and self._kinds == _kinds(inputs) and read.addresses() == self._addresses

    def takes(self, inputs: Inputs, is_open: Callable[["_Graph"], bool]) -> bool:
        """Brings the inputs to where the recording reads them; False where something else needs that place."""
        pairs = [pair for pair in zip(self._slots, inputs, strict=True) if pair[0] is not None]
        pairs = [(slot, given) for slot, given in pairs if not slot.holds(given)]
        shared = [slot for slots in self.chain.slots.values() for slot in slots]
        for slot, _ in pairs:
            if slot.is_borrowed or (slot in shared and any(map(is_open, self._users(slot)))):
                return False
        for slot, given in pairs:
            slot.bring(given)
        return True

    def _users(self, slot: _Slot) -> list["_Graph"]:
        return [graph for graph in self.chain.graphs.values() if slot in graph._slots]

    def forward(self) -> Tensor:
        self._forward.replay()
        return self._forward.outputs[0].detach()

    def backward(self, dy: Tensor) -> list[Tensor | None]:
        """Gradients of the differentiated inputs and of the trained parameters."""
        if self._backward is None and not self._record_backward(dy):
            # The recorded forward's autograd graph reads what the replay has just written.
            return list(torch.autograd.grad(self._y, self._wanted, dy, retain_graph=True, allow_unused=True))
        if not self._dy.holds(dy):
            self._dy.bring(dy)
        grads = self._backward.outputs
        for parameter, grad in zip(self.trained, grads[len(self.differentiated) :], strict=True):
            old = parameter.grad
            if old is not None and grad is not None and old.data_ptr() == grad.data_ptr():
                parameter.grad = old.clone()
        self._backward.replay()
        return [None if grad is None else grad.detach() for grad in grads]

    def _record_backward(self, dy: Tensor) -> bool:
        chain = self.chain
        chain.is_recording = False
        if not chain.may_record_backwards:
            return False
        # The memory of a backward that was recorded is given to later recordings: none may belong to a layer before.
        if self.index != len(chain.graphs) - 1 - chain.num_backwards:
            return False
        self._dy = _Slot(dy, borrowed=dy.data_ptr() in chain.addresses)
        try:
            with _as_recorded():
                # Kept until the recording has succeeded: else the caller differentiates without one.
                self._backward = self._recorder.record(
                    lambda: torch.autograd.grad(
                        self._y, self._wanted, self._dy.static, retain_graph=True, allow_unused=True
                    )
                )
        except RuntimeError as error:
            chain.may_record_backwards = False
            _say(f"backwards are not recorded: {_first_line(error)}")
            return False
        chain.num_backwards += 1
        self._y = None
        for grad in self._backward.outputs[: len(self.differentiated)]:
            if grad is not None:
                chain.addresses.add(grad.data_ptr())
        return True


@contextmanager
def _as_recorded() -> Iterator[None]:
    """Autocast keeps casts of parameters for later calls; those of a recording are rewritten by every replay."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _leaf(parameter: Tensor) -> Tensor:
    """A leaf of its own at the parameter's memory: autograd's node of the parameter belongs to another stream, which a
    recording cannot wait for, and `.data` has another version counter, which an optimizer does not move."""
    leaf = parameter.data.requires_grad_()
    leaf.__dict__.update(parameter.__dict__)
    return leaf


def _kinds(inputs: Inputs) -> tuple:
    return tuple(None if given is None else (given.stride(), given.requires_grad) for given in inputs)


def _recorded_keys(layer: nn.Module) -> set[str]:
    return {key for hook in layer._forward_hooks.values() if (key := recorded_key(hook)) is not None}


def _say(reason: str) -> None:
    _logger.warning("CUDA graphs: %s", reason)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class LayerGraphs:
    """The CUDA graphs of a model's decoder layers; copies and pickles of a model start without any.

    most_shapes: of these shapes the graphs are kept, those used last.
    """

    def __init__(self, most_shapes: int = _MOST_SHAPES):
        self.most_shapes = most_shapes
        self.reasons: dict[str, None] = {}  # why something ran eagerly that trained, in the order of their first time
        self._chains: OrderedDict[tuple, _Chain] = OrderedDict()
        self._reads: weakref.WeakKeyDictionary[nn.Module, _Read] = weakref.WeakKeyDictionary()
        self._recorders: dict[torch.device, Recorder | None] = {}
        self._open: list[weakref.ref[_Pass]] = []
        self._broken: str | None = None

    def __deepcopy__(self, memo) -> "LayerGraphs":
        return memo.setdefault(id(self), LayerGraphs(self.most_shapes))

    def __reduce__(self):
        return LayerGraphs, (self.most_shapes,)

    @property
    def num_recorded(self) -> int:
        return sum(len(chain.graphs) for chain in self._chains.values())

    def summary(self) -> str:
        """One line: what is replayed, and why some calls ran eagerly."""
        shapes = sum(bool(chain.graphs) for chain in self._chains.values())
        eager = f"; eager at times: {'; '.join(self.reasons)}" if self.reasons else ""
        return f"{self.num_recorded} layers recorded at {shapes} shapes{eager}"

    def run(
        self,
        layer: nn.Module,
        place: int,
        sites: LayerSites,
        settings: tuple,
        inputs: Inputs,
        compute: Callable[[LayerSites, Inputs], Tensor],
    ) -> Tensor | None:
        """The layer's output from a graph; None where the layer has to run eagerly.

        place: the layer's in the decoder. sites, settings: everything that `compute` reads but its inputs. compute:
        what is recorded; called with `sites` and `Inputs` at fixed addresses.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        reason = self._why_eager(layer, sites, inputs)
        if reason is not None:
            self.reasons[reason] = None
            return None
        chain, read = self._chain_of(inputs), self._read_of(layer, sites, settings)
        if chain.is_given_up:
            self.reasons["its tensors move from step to step"] = None
            return None
        graph = chain.graphs.get(layer)
        if graph is not None and not graph.fits(read, inputs):
            chain.restart()
            return None
        if graph is None:
            if not chain.takes(place):
                if not chain.plans:
                    return None
                with repeated_shapes():
                    return compute(sites, inputs)
            if not self._is_next(chain, len(chain.graphs)):
                chain.restart()
                return None
            graph = self._recorded(chain, layer, read, inputs, compute)
            if graph is None:
                return None
        else:
            chain.is_recording = False  # its turn has come again: a new step
            if not self._is_next(chain, graph.index):
                self.reasons["a forward before the backward of another one"] = None
                return None
            if not graph.takes(inputs, self._is_open):
                self.reasons["an input that another layer's backward still needs"] = None
                return None
        tensors = [inputs[i] for i in graph.differentiated] + graph.trained
        if not tensors:
            return graph.forward()
        replayed = _Pass(graph, self)
        self._open.append(weakref.ref(replayed))
        return _Replayed.apply(replayed, *tensors)

    def _why_eager(self, layer: nn.Module, sites: LayerSites, inputs: Inputs) -> str | None:
        if self._broken is not None:
            return self._broken
        device = inputs.x.device
        if device not in self._recorders:
            self._recorders[device] = recorder_for(device)
        if self._recorders[device] is None:
            return f"tensors are on {device.type}"
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            return "something watches every operator"
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return "kept tensors go through hooks (activation checkpointing, offloading)"
        if not all(site.is_found for site in sites.linears):
            return "weights are computed at every call"
        if layer._forward_hooks and (has_hooks(layer) or is_recorded(_recorded_keys(layer))):
            return "a layer's output is looked at"
        return None

    def _chain_of(self, inputs: Inputs) -> _Chain:
        shapes = tuple(None if given is None else (given.shape, given.dtype) for given in inputs)
        settings = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
        key = (inputs.x.device, shapes, autocast_dtype(inputs.x), forced_provider(), settings)
        chain = self._chains.get(key)
        if chain is None:
            recorder = self._recorders[inputs.x.device]
            chain = self._chains[key] = _Chain(inputs.x.device, recorder.synchronize)
        self._chains.move_to_end(key)
        if len(self._chains) > _MOST_SEEN:
            self._chains.popitem(last=False)[1].clear()
        return chain

    def _make_room(self, wanted: _Chain) -> None:
        """Drops the graphs of the shape that was used the longest time ago where there are too many."""
        held = [chain for chain in self._chains.values() if chain.graphs and chain is not wanted]
        for chain in held[: max(0, len(held) + 1 - self.most_shapes)]:
            chain.restart(for_room=True)

    def _read_of(self, layer: nn.Module, sites: LayerSites, settings: tuple) -> _Read:
        read = self._reads.get(layer)
        if read is None or read.sites is not sites or read.rest[0] != settings:
            read = self._reads[layer] = _read(sites, settings)
        return read

    def _recorded(self, chain: _Chain, layer: nn.Module, read: _Read, inputs: Inputs, compute) -> _Graph | None:
        self._make_room(chain)
        try:
            graph = _Graph(chain, self._recorders[chain.device], read, inputs, compute)
        except RuntimeError as error:
            self._broken = f"recording failed: {_first_line(error)}"
            _say(f"{self._broken}; all layers run eagerly")
            return None
        chain.graphs[layer] = graph
        return graph

    def open_passes(self) -> list[_Pass]:
        passes = [replayed for ref in self._open if (replayed := ref()) is not None and not replayed.is_done]
        self._open = [weakref.ref(replayed) for replayed in passes]
        return passes

    def _is_open(self, graph: _Graph) -> bool:
        return any(replayed.graph is graph for replayed in self.open_passes())

    def _is_next(self, chain: _Chain, index: int) -> bool:
        """Whether the recording `index` of a chain may run over what waits for its backward."""
        return all(
            replayed.graph.chain is chain and (replayed.graph.index < index or replayed.is_overwritten)
            for replayed in self.open_passes()
            if replayed.graph.chain.device == chain.device
        )
