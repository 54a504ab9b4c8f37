"""Runs the cases of one op against every peer: the same inputs, in the same process, timed in turns."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .timing import Ceilings, Probes, Timing, Work, peak_memory, time_calls

TOO_BIG = 8 * 2**30  # bytes of intermediates over which a peer is not run
KEOPS_DIMENSIONS = 512  # it unrolls them: a formula with gradients over 1,024 compiles for ten minutes
OURS = "latent-engine"


@dataclass(frozen=True)
class Suite:
    """A public function with its cases and peers; `bench/<op>.py` defines one or several as SUITES.

    Every callable of tensors takes what `inputs` gives; the gradients taken are those of the floating-point ones.
    """

    op: Callable  # of the tensors, and `backend=`
    sizes: tuple[str, ...]  # names of the sizes of a case
    cases: dict[str, tuple[int, ...]]
    inputs: Callable[[str, torch.dtype, str], tuple[Tensor, ...]]
    work: Callable[[str, bool], Work]
    plain: Callable
    formulas: dict[str, Callable]  # PyTorch peers, `plain` among them
    plain_bytes: Callable[[str], int]  # intermediates of the plain formula
    keops: Callable | None = None
    jax: dict[str, Callable] = field(default_factory=dict)
    directions: tuple[bool, ...] = (False, True)  # without and with the backward pass
    constant: int = 0  # trailing inputs that need no gradient
    slow: tuple[str, ...] = ()  # peers that take minutes on a CPU
    direct: bool = False  # the op gives value and gradients itself, without autograd
    exact: Callable | None = None  # the formula of the truth, where the op's reference does not fit memory
    in_place: bool = False  # the op writes to its inputs: each peer has its own
    comparable: Callable[[list[Tensor]], list[Tensor]] = list  # of values and gradients, those that do not depend on chance
    builders: dict[str, Callable] = field(default_factory=dict)  # peers `(tensors, backward) -> call`


@dataclass
class Result:
    """One case in one direction. Times in seconds, memory in bytes, errors relative to float64."""

    op: str
    case: str
    sizes: dict[str, int]
    backward: bool
    bound: float
    limit: str
    timings: dict[str, Timing] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def best_peer(self) -> str | None:
        peers = [name for name in self.timings if name != OURS]
        return min(peers, key=lambda name: self.timings[name].median) if peers else None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "best_peer": self.best_peer}


def run_case(suite: Suite, case: str, backward: bool, device: str, ceilings: Ceilings, compiled: bool) -> Result:
    """Checks every peer's values against float64, then times those that passed, and in the same turns the ceiling that by
    `ceilings` bounds the case."""
    torch._dynamo.reset()  # after eight compilations of a formula the ninth would run uncompiled
    bound, limit = ceilings.bound(suite.work(case, backward))
    sizes = dict(zip(suite.sizes, suite.cases[case], strict=True))
    result = Result(suite.op.__name__, case, sizes, backward, bound, limit)
    tensors = suite.inputs(case, torch.float32, device)
    exact = _exact(suite, case, backward, device)
    calls, outputs = {}, {}
    for name, build in _peers(suite, case, device, compiled, result).items():
        call = build(tuple(t.clone() for t in tensors) if suite.in_place else tensors, backward)
        outputs[name] = call()
        calls[name] = call
    result.errors = {name: _error(suite, output, exact) for name, output in outputs.items()}
    # twice the plain formula's error and a rounding of the result: the budget of every kernel; peers get a thousandth
    direct = suite.exact if suite.exact and suite.plain_bytes(case) > TOO_BIG else suite.plain
    budget = 2 * _error(suite, _builder(suite, direct)(tensors, backward)(), exact) + 4 * torch.finfo(torch.float32).eps
    for name in list(calls):
        if not result.errors[name] <= (budget if name == OURS else 1e-3):
            result.skipped[name] = f"wrong values: relative error {result.errors[name]:.1e}"
            del calls[name]
    del outputs, exact
    result.memory = {name: peak_memory(call, device) for name, call in calls.items() if not name.startswith("jax")}
    probes = Probes(device)
    times = time_calls(calls, device, beside=probes.of(limit))
    result.bound = suite.work(case, backward).amount(limit) / probes.rate(limit, {name: t.median for name, t in times.items()})
    result.timings = {name: times[name] for name in calls}
    return result


def _peers(suite: Suite, case: str, device: str, compiled: bool, result: Result) -> dict[str, Callable]:
    """Builders `(tensors, backward) -> call` by name; what cannot run is noted in `result.skipped`."""
    peers = {OURS: _ours(suite)}
    for name, formula in suite.formulas.items():
        peers[name] = _builder(suite, formula)
        if compiled:
            peers[f"compiled {name}"] = _builder(suite, torch.compile(formula, dynamic=False))
    if suite.keops and result.sizes["D"] > KEOPS_DIMENSIONS:
        result.skipped["keops"] = "too many dimensions to compile"
    elif suite.keops and importlib.util.find_spec("pykeops"):
        peers["keops"] = _builder(suite, suite.keops)
    elif suite.keops:
        result.skipped["keops"] = "not installed"
    peers |= suite.builders
    for name, peer in suite.jax.items():
        if device == "cpu" and importlib.util.find_spec("jax"):
            peers[name] = peer()
        else:
            result.skipped[name] = "not installed" if device == "cpu" else "CPU only"
    if suite.plain_bytes(case) > TOO_BIG:  # compilers fuse the forward pass, but keep the intermediates for the other
        for name in [name for name in peers if name == "plain" or (result.backward and name.endswith(" plain"))]:
            del peers[name]
            result.skipped[name] = "too big"
    for name in suite.slow if device == "cpu" else ():
        if peers.pop(name, None):
            result.skipped[name] = "too slow"
    return peers


def _ours(suite: Suite, **options: str) -> Callable:
    if suite.direct:
        return lambda tensors, backward: lambda: suite.op(*tensors, **options)
    return _builder(suite, lambda *tensors: suite.op(*tensors, **options))


def _builder(suite: Suite, formula: Callable) -> Callable:
    return lambda tensors, backward: _torch_call(formula, tensors, len(tensors) - suite.constant, backward)


def _torch_call(formula: Callable, tensors: tuple[Tensor, ...], variable: int, backward: bool) -> Callable[[], Any]:
    """The value or values, and with `backward` the gradients of the first `variable` tensors for incoming ones of ones."""
    if not backward:
        def forward() -> Any:
            with torch.no_grad():
                return formula(*tensors)
        return forward
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:variable]]
    constant = tensors[variable:]

    def outputs() -> tuple[Tensor, ...]:
        value = formula(*leaves, *constant)
        return (value,) if isinstance(value, Tensor) else value

    incoming = [torch.ones_like(value) for value in outputs()]

    def both() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        values = outputs()
        return tuple(value.detach() for value in values), torch.autograd.grad(values, leaves, incoming)

    return both


def _exact(suite: Suite, case: str, backward: bool, device: str) -> Any:
    """Values in float64 through the op's own reference, of which the tests show that it is right."""
    tensors = suite.inputs(case, torch.float64, device)
    truth = _builder(suite, suite.exact) if suite.exact else _ours(suite, backend="reference")
    return truth(tensors, backward)()


def _flatten(output: Any) -> list[Tensor]:
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in _flatten(part)]
    return [output if isinstance(output, Tensor) else torch.tensor(output.tolist())]


def _error(suite: Suite, output: Any, exact: Any) -> float:
    """The largest relative norm error over values and gradients."""
    pairs = zip(*(suite.comparable(_flatten(t)) for t in (output, exact)), strict=True)
    return max(((a.to(b) - b).norm() / b.norm()).item() for a, b in pairs)
