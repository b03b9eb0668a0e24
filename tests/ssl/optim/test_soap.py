"""Our SOAP against pytorch_optimizer's, step by step; its turns, its processes and its state."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_group
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pytorch_optimizer import SOAP as LibrarySOAP
from torch import Tensor, nn

from skipless.ssl.optim.soap import SOAP, balance

Shape = tuple[int, ...]

# Matrices with twins, sides above the largest of 12, vectors, a scalar, CLS, positions, convolutions, sides of 1.
SHAPES: list[Shape] = [
    *[(6, 4), (6, 4), (4, 6), (5, 5), (5, 5), (3, 20), (20, 3), (13, 14), (7,), (7,), ()],
    *[(1, 1, 6), (1, 4, 6), (6, 3, 2, 2), (6, 3, 2, 2), (2, 40, 3), (1, 30), (30, 1), (1, 1)],
]


@pytest.fixture(autouse=True)
def solve_matrices_of_a_stack_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs LAPACK's last bits depend on where in memory a matrix lies; a copy is aligned. By them alone the
    eigenvectors of a null space, which are arbitrary, would differ from the library's, which solves one by one."""
    solve = torch.linalg.eigh

    def eigh(matrices: Tensor) -> Any:
        if matrices.device.type == "meta" or matrices.ndim == 2:
            return solve(matrices)
        values, vectors = zip(*(solve(matrix.clone()) for matrix in matrices), strict=True)
        return torch.return_types.linalg_eigh((torch.stack(values), torch.stack(vectors)))

    monkeypatch.setattr(torch.linalg, "eigh", eigh)


def parameters(shapes: list[Shape], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradient(shape: Shape, step: int, number: int) -> Tensor:
    """Random eighths: their products are exact, and so the same in whatever order they are summed.

    The first gradient's products have a null space, whose eigenvectors are arbitrary: they are the same in two
    implementations only if the products are, bit by bit.
    """
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(8).round().div(8)


def set_gradients(of: list[nn.Parameter], step: int, missing: Callable[[int, int], bool] = lambda s, n: False) -> None:
    for number, parameter in enumerate(of):
        drawn = gradient(tuple(parameter.shape), step, number).to(parameter.dtype)
        parameter.grad = None if missing(step, number) else drawn


def two_groups(of: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": of[::2], "weight_decay": 0.1}, {"params": of[1::2], "weight_decay": 0.0}]


def sometimes(step: int, number: int) -> bool:
    """Some parameters lack a gradient in some steps: in the first, in a step of refreshes, in others."""
    return (step + number) % 11 == 3


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Another one every step; the second group is frozen at first."""
    optimizer.param_groups[0]["lr"] = 1e-2 * (1 + step % 7)
    optimizer.param_groups[1]["lr"] = 0.0 if step < 5 else 2e-2


def advance(optimizer: torch.optim.Optimizer, of: list[nn.Parameter], steps: Iterable[int]) -> None:
    """Steps with changing rates and missing gradients."""
    for step in steps:
        set_learning_rates(optimizer, step)
        set_gradients(of, step, sometimes)
        optimizer.step()


def assert_equal(moved: list[nn.Parameter], expected: list[nn.Parameter], tolerance: float, step: int = -1) -> None:
    for a, b in zip(moved, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"{tuple(a.shape)}, step {step}")


def test_trajectories_are_the_librarys() -> None:
    """Every shape, two groups, changing rates, missing gradients and a third group that comes late, over 60 steps with
    seven refreshes."""
    ours, reference = parameters(SHAPES), parameters(SHAPES)
    late, late_too = parameters([(4, 3), (5,)]), parameters([(4, 3), (5,)])
    options: dict[str, Any] = {"betas": (0.9, 0.95), "precondition_frequency": 8, "max_precondition_dim": 12}
    a, b = SOAP(two_groups(ours), **options), LibrarySOAP(two_groups(reference), **options)
    for step in range(60):
        if step == 20:
            a.add_param_group({"params": late})
            b.add_param_group({"params": late_too})
        advance(a, [*ours, *late], [step])
        advance(b, [*reference, *late_too], [step])
        assert_equal([*ours, *late], [*reference, *late_too], 1e-10, step)
    assert min((p - q).abs().max() for p, q in zip(ours, parameters(SHAPES), strict=True)) > 0.1


@given(
    shapes=st.lists(st.lists(st.integers(1, 7), max_size=4).map(tuple), min_size=1, max_size=6),
    period=st.integers(3, 9),
    largest=st.integers(3, 8),
    betas=st.tuples(st.sampled_from([0.0, 0.9, 0.95]), st.sampled_from([0.8, 0.95, 0.999])),
    eps=st.sampled_from([1e-8, 1e-3]),
    decay=st.sampled_from([0.0, 0.04]),
)
@settings(max_examples=15)
def test_any_shapes_and_arguments(
    shapes: list[Shape], period: int, largest: int, betas: tuple[float, float], eps: float, decay: float
) -> None:
    for shape in shapes:
        if len(shape) > 1:
            # Before the first refresh all directions but one have been seen: the others would be arbitrary.
            assume(all(period * math.prod(shape) >= side * (side - 1) for side in shape))
    ours, reference = parameters(shapes), parameters(shapes)
    options: dict[str, Any] = {"lr": 0.01, "betas": betas, "eps": eps, "weight_decay": decay}
    options |= {"precondition_frequency": period, "max_precondition_dim": largest}
    a, b = SOAP(ours, **options), LibrarySOAP(reference, **options)
    for step in range(36):
        for optimizer, of in ((a, ours), (b, reference)):
            set_gradients(of, step)
            optimizer.step()
        # Refreshes are in float32: a value that is rounded the other way is one unit there.
        assert_equal(ours, reference, 1e-6, step)


def test_a_parameter_that_comes_in_a_step_of_refreshes() -> None:
    """Its basis is refreshed twice, which leaves float32's rounding errors: too small a number to be nothing, since
    Adam makes large moves of them."""
    ours, reference = parameters([(5, 5), (4, 4), (6,)]), parameters([(5, 5), (4, 4), (6,)])
    a, b = SOAP(ours, precondition_frequency=6), LibrarySOAP(reference, precondition_frequency=6)
    for step in range(36):
        for optimizer, of in ((a, ours), (b, reference)):
            set_gradients(of, step, lambda step, number: number == 1 and step < 12)
            optimizer.step()
        assert_equal(ours, reference, 1e-7, step)


def test_stacks_may_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks are bounded; where they are cut does not matter."""
    # Matrices of 5 x 5 lie otherwise in memory when they are cut, and with them the last bits of their products.
    shapes = [(8, 8) if shape == (5, 5) else shape for shape in SHAPES * 2]
    whole, cut = parameters(shapes), parameters(shapes)
    for of, most in ((whole, 2**24), (cut, 50)):
        monkeypatch.setattr("skipless.ssl.optim.soap.STACK", most)
        optimizer = SOAP(of, precondition_frequency=3, max_precondition_dim=12)
        for step in range(10):
            set_gradients(of, step)
            optimizer.step()
    assert_equal(cut, whole, 1e-10)


def test_closure_is_evaluated_with_gradients() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))  # of full rank, or moves are of rounding errors
    optimizer = SOAP([weight])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 14
    optimizer.step(closure)
    assert closure().item() < 14


def test_no_step_looks_at_a_value() -> None:
    """Tensors of the meta device have none: whatever would wait for a GPU fails there."""
    of = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = SOAP(two_groups(of), precondition_frequency=3, spread=True)
    for _ in range(8):
        for parameter in of:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()


def test_a_copy_goes_on_alone() -> None:
    of = parameters(SHAPES)
    optimizer = SOAP(two_groups(of), precondition_frequency=3, spread=True)
    set_gradients(of, 0)
    optimizer.step()
    kept, other = copy.deepcopy((of, optimizer))
    for moved, rule in ((of, optimizer), (kept, other)):
        set_gradients(moved, 1)
        rule.step()
    assert_equal(kept, of, tolerance=0)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"precondition_frequency": 0}])
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SOAP(parameters([(2, 2)]), **wrong)


def losses(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> Tensor:
    """Of a small network that learns a badly conditioned task from mini-batches."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8)).double()
    scale, target = torch.logspace(-1, 0.5, 12).double(), torch.randn(12, 8).double() / 2
    network, values = network.to(dtype), []
    optimizer = make(network.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(200):
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * scale
        loss = (network(x.to(dtype)) - torch.tanh(x @ target).to(dtype)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.detach().double())
    return torch.stack(values)


def test_float32_is_as_exact_as_the_librarys() -> None:
    exact, reference = losses(LibrarySOAP, torch.float64), losses(LibrarySOAP, torch.float32)
    ours = losses(SOAP, torch.float32)
    assert exact[-20:].mean() < 0.01 * exact[:20].mean()
    assert (ours - exact).abs().mean() < 1.5 * (reference - exact).abs().mean()
    spread = losses(lambda of, **options: SOAP(of, spread=True, **options), torch.float32)
    assert spread[-20:].mean() < 2 * exact[-20:].mean()


def bases(optimizer: SOAP) -> list[Tensor]:
    return [
        basis.clone()
        for group in optimizer.param_groups
        for parameter in group["params"]
        for basis in optimizer.state[parameter]["Q"]
        if len(basis)
    ]


def refreshes(spread: bool, period: int, steps: int) -> Iterator[list[int]]:
    """Of every step from the second on: the lengths of the sides whose basis changed."""
    of = parameters([(8, 8)] * 6 + [(24, 8)] * 6 + [(8, 32), (32, 8)] * 6 + [(8, 3, 4, 4), (1, 5, 8), (8,)])
    optimizer = SOAP(two_groups(of), precondition_frequency=period, max_precondition_dim=40, spread=spread)
    set_gradients(of, 0)
    optimizer.step()
    before = bases(optimizer)
    for step in range(1, steps):
        set_gradients(of, step)
        optimizer.step()
        after = bases(optimizer)
        yield [len(a) for a, b in zip(after, before, strict=True) if not torch.equal(a, b)]
        before = after


def test_together_all_are_refreshed_in_one_step() -> None:
    for step, lengths in enumerate(refreshes(False, 4, 13), start=1):
        assert len(lengths) == (54 if step % 4 == 0 else 0)  # 2 sides of 24 matrices, 4 of one kernel, 2 of positions


def test_turns_share_the_work_and_leave_nothing_out() -> None:
    """Each basis once a period, always in the same step; no step has more than its share and one matrix."""
    period = 5
    changed = list(refreshes(True, period, 2 * period + 1))
    assert changed[:period] == changed[period:]
    once = sorted(length for lengths in changed[:period] for length in lengths)
    assert once == sorted([8] * 12 + [24, 8] * 6 + [8, 32] * 12 + [8, 3, 4, 4, 5, 8])
    costs = [sum(length**3 for length in lengths) for lengths in changed[:period]]
    assert max(costs) < 1.3 * sum(costs) / period


def test_with_a_period_of_one_turns_change_nothing() -> None:
    ours, others = parameters(SHAPES), parameters(SHAPES)
    for of, spread in ((ours, True), (others, False)):
        optimizer = SOAP(two_groups(of), precondition_frequency=1, spread=spread)
        for step in range(12):
            set_gradients(of, step, sometimes)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@given(jobs=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 1000)), max_size=8), bins=st.integers(1, 12))
def test_balance(jobs: list[tuple[int, int]], bins: int) -> None:
    """Graham, 1969: longest first, no bin has more than the mean and the part 1 - 1 / bins of one job."""
    shares = balance(jobs, bins)
    assert [len(share) for share in shares] == [count for count, _ in jobs]
    assert all(share == sorted(share) for share in shares)
    loads = [sum(cost * share.count(b) for (_, cost), share in zip(jobs, shares, strict=True)) for b in range(bins)]
    longest = max((cost for count, cost in jobs if count), default=0)
    assert max(loads) <= sum(loads) / bins + (1 - 1 / bins) * longest + 1e-9


def through_a_file(state: dict[str, Any], path: Path) -> dict[str, Any]:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("stop", [0, 1, 13])
def test_goes_on_from_the_librarys_checkpoint(tmp_path: Path, stop: int) -> None:
    ours, reference = parameters(SHAPES), parameters(SHAPES)
    options: dict[str, Any] = {"betas": (0.9, 0.95), "precondition_frequency": 8, "max_precondition_dim": 12}
    library = LibrarySOAP(two_groups(reference), **options)
    advance(library, reference, range(stop))
    for a, b in zip(ours, reference, strict=True):
        a.data.copy_(b.data)
    optimizer = SOAP(two_groups(ours), **options)
    optimizer.load_state_dict(through_a_file(library.state_dict(), tmp_path / "state.pt"))
    for step in range(stop, 50):
        advance(optimizer, ours, [step])
        advance(library, reference, [step])
        assert_equal(ours, reference, 1e-10, step)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 2, 7])
def test_resumed_is_bit_identical(tmp_path: Path, spread: bool, stop: int) -> None:
    def make(of: list[nn.Parameter]) -> SOAP:
        return SOAP(two_groups(of), precondition_frequency=5, max_precondition_dim=12, spread=spread)

    whole, first, second = (parameters(SHAPES, torch.float32) for _ in range(3))
    advance(make(whole), whole, range(20))
    stopped = make(first)
    advance(stopped, first, range(stop))
    state = through_a_file({"parameters": first, "optimizer": stopped.state_dict()}, tmp_path / "state.pt")
    advance(stopped, first, range(stop, 20))  # to save disturbs nothing
    for a, b in zip(second, state["parameters"], strict=True):
        a.data.copy_(b)
    resumed = make(second)
    resumed.load_state_dict(state["optimizer"])
    # Loaded and saved again, before any step.
    resumed.load_state_dict(through_a_file(resumed.state_dict(), tmp_path / "again.pt"))
    advance(resumed, second, range(stop, 20))
    for a, b, c in zip(whole, first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_state_is_written_once(tmp_path: Path) -> None:
    shapes: list[Shape] = [(64, 32)] * 10 + [(64,)] * 10
    of = parameters(shapes, torch.float32)
    optimizer = SOAP(of)
    for step in range(2):
        set_gradients(of, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    numbers = 10 * (2 * 64 * 32 + 2 * 64**2 + 2 * 32**2) + 10 * 2 * 64
    assert 4 * numbers < (tmp_path / "state.pt").stat().st_size < 4 * numbers + 40_000
    state = optimizer.state[of[0]]
    assert set(state) == {"exp_avg", "exp_avg_sq", "GG", "Q"}
    assert [tuple(gram.shape) for gram in state["GG"]] == [(64, 64), (32, 32)]
    assert optimizer.state[of[-1]]["GG"] == [[]]


def test_two_processes_divide_the_bases_and_agree_with_one() -> None:
    assert [done.stdout for done in run_group("processes.soap", [])] == ["equal\n", "equal\n"]
