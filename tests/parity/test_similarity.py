"""How alike layers are, beside scipy and beside the papers' formulas worked out in memory."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from mslt.evaluate.similarity import LinearCka, js_distance, js_sums


def softmax_of(generator: torch.Generator, *shape: int, spread: float = 3.0) -> torch.Tensor:
    return (spread * torch.randn(*shape, generator=generator)).softmax(-1)


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 300.0])
def test_distance_is_scipys(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (softmax_of(generator, 50, 17, spread=spread).double() for _ in range(2))
    expected = jensenshannon(p.numpy(), q.numpy(), base=2, axis=1)
    assert js_distance(p, q).numpy() == pytest.approx(expected, abs=1e-7)  # the root of fp64's rounding
    assert torch.equal(js_distance(p, q), js_distance(q, p))


def test_distance_keeps_its_bounds() -> None:
    apart = js_distance(torch.tensor([0.5, 0.5, 0, 0]).double(), torch.tensor([0, 0, 0.3, 0.7]).double())
    assert apart.item() == 1
    p = softmax_of(torch.Generator().manual_seed(1), 100, 9).double()
    assert not js_distance(p, p.clone()).any()


def test_sums_leave_padding_out() -> None:
    """Against scipy, one sentence, head and token at a time. What padding is given, and gives, is 1e6 there."""
    generator = torch.Generator().manual_seed(0)
    lengths, heads, most = (5, 7, 3), 2, 7
    mask = torch.arange(most) < torch.tensor(lengths)[:, None]

    def layer() -> torch.Tensor:
        p = torch.full((3, heads, most, most), 1e6)
        for row, length in enumerate(lengths):
            p[row, :, :length, :length] = softmax_of(generator, heads, length, length)
        return p

    first, second = [layer(), layer()], [layer(), layer(), layer()]
    expected = np.zeros((2, 3))
    for i, j in np.ndindex(2, 3):
        for row, length in enumerate(lengths):
            for head, query in np.ndindex(heads, length):
                p, q = (side[row, head, query, :length].double().numpy() for side in (first[i], second[j]))
                expected[i, j] += jensenshannon(p, q, base=2) / heads
    assert js_sums(first, second, mask).numpy() == pytest.approx(expected, abs=1e-6)


def test_sums_of_a_layer_with_itself_are_exactly_nothing() -> None:
    layers = [softmax_of(torch.Generator().manual_seed(seed), 2, 3, 6, 6) for seed in range(3)]
    mask = torch.ones(2, 6).bool()
    shared, copied = js_sums(layers, layers, mask), js_sums(layers, [layer.clone() for layer in layers], mask)
    assert torch.equal(shared, copied)
    assert not shared.diagonal().any()
    assert torch.equal(shared, shared.T)
    assert shared[0, 1] > 1


def cka_by_definition(x_ND: np.ndarray, y_NE: np.ndarray) -> float:
    """Kornblith et al. 2019, equations 3 and 4: HSIC of linear kernels, centred, over the root of those of each."""
    centre = np.eye(len(x_ND)) - 1 / len(x_ND)
    kernels = [centre @ (side @ side.T) @ centre for side in (x_ND, y_NE)]

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.trace(a @ b)) / (len(a) - 1) ** 2

    return hsic(*kernels) / (hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1])) ** 0.5


def states(seed: int, sizes: list[tuple[int, int]], width: int, layers: int) -> list[list[torch.Tensor]]:
    """Of each batch [B, T, width] for each layer: far from 0, with one feature far larger, as encoders have them."""
    generator = torch.Generator().manual_seed(seed)
    mix = [torch.randn(width, width, generator=generator) for _ in range(layers)]
    made = []
    for size in sizes:
        h = torch.randn(*size, width, generator=generator)
        made.append([h @ m + 30 + 500 * (torch.arange(width) == 2) for m in mix])
    return made


def test_cka_in_batches_is_the_definition_in_memory() -> None:
    sizes = [(2, 9), (1, 1), (5, 30), (3, 4)]
    firsts, seconds = states(0, sizes, width=6, layers=2), states(1, sizes, width=11, layers=3)
    seconds = [
        [h + first[0] @ torch.ones(6, 11) for h in second] for first, second in zip(firsts, seconds, strict=True)
    ]
    masks = [torch.rand(*size, generator=torch.Generator().manual_seed(size[1])) < 0.7 for size in sizes]
    masks[1][:] = True
    cka = LinearCka()
    for first, second, mask in zip(firsts, seconds, masks, strict=True):
        cka.add(first, second, mask)

    def whole(batches: list[list[torch.Tensor]], layer: int) -> np.ndarray:
        return torch.cat([batch[layer][mask] for batch, mask in zip(batches, masks, strict=True)]).double().numpy()

    expected = [[cka_by_definition(whole(firsts, i), whole(seconds, j)) for j in range(3)] for i in range(2)]
    assert cka.num_tokens == sum(int(mask.sum()) for mask in masks)
    assert cka.values().numpy() == pytest.approx(np.array(expected), abs=1e-12)
    assert 0.01 < np.min(expected) < np.max(expected) < 0.99


def test_what_cka_holds_does_not_grow_with_the_corpus() -> None:
    def held(num_batches: int) -> int:
        cka = LinearCka()
        for batch in states(7, [(2, 6)] * num_batches, width=5, layers=3):
            cka.add(batch, batch, torch.ones(2, 6).bool())
        attributes = [value if isinstance(value, list) else [value] for value in vars(cka).values()]
        tensors = [value for values in attributes for value in values if isinstance(value, torch.Tensor)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    assert held(20) == held(1) == 8 * (3 * 3 * 5 * 5 + 2 * 3 * 5 * 5 + 2 * 3 * 5)


def test_cka_knows_no_rotation_scale_or_shift() -> None:
    (batch,) = states(3, [(4, 50)], width=8, layers=1)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(4)).double()).Q
    turned = [7 * batch[0].double() @ rotation - 100]
    cka = LinearCka()
    cka.add(batch, turned, torch.ones(4, 50).bool())
    assert cka.values().item() == pytest.approx(1, abs=1e-12)


def test_cka_of_noise_is_what_noise_shows() -> None:
    generator = torch.Generator().manual_seed(5)
    cka = LinearCka()
    first, second = (torch.randn(10, 40, width, generator=generator) for width in (60, 90))
    cka.add([first], [second], torch.ones(10, 40).bool())
    assert cka.values().item() == pytest.approx(cka.of_noise(), rel=0.03)
    assert cka.of_noise() > 0.1


def test_cka_of_a_state_that_does_not_vary_is_no_number() -> None:
    (batch,) = states(6, [(2, 5)], width=4, layers=1)
    cka = LinearCka()
    cka.add(batch, [torch.ones(2, 5, 4)], torch.ones(2, 5).bool())
    assert cka.values().isnan().all()
