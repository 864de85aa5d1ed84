"""Each row a function of the seed and its own number; labels those of the posterior; the law that plain draws have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from common.evaluation.heads import LinearHead
from common.generator.row_law import Middle, RowDrawer, RowLaw
from common.generator.row_numbers import row_key
from tests.row_cases import rows_of

KEY = row_key("test", 1)
_MEANS = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0]], dtype=torch.float64)
_WEIGHT = torch.tensor([[2.0, 0.0, 0.3, 0.1], [0.0, 1.5, -0.2, 0.4], [-0.5, 0.2, 1.0, 0.0]], dtype=torch.float64)
HEADS = (
    LinearHead(_WEIGHT, torch.tensor([0.6, 0.0, -0.6], dtype=torch.float64)),
    LinearHead(-0.5 * _WEIGHT, torch.tensor([0.0, 0.2, 0.4], dtype=torch.float64)),
)


def middle(labels: Tensor, uniform: Tensor, normal: Tensor) -> Middle:
    """The class's mean moved along one axis by a latent; two heads take rows in turn, by a uniform number."""
    means = _MEANS[labels] + 0.3 * normal[:, :1] * torch.tensor([0.0, 0.0, 0.0, 1.0])
    scale = 0.2 + 0.3 * uniform[:, [1]]
    return Middle(means, scale, (uniform[:, 0] < 0.4).long())


ROOT = torch.tensor([[1.0, 0.2, 0.0, 0.0], [0.2, 0.7, 0.1, 0.0], [0.0, 0.1, 1.2, 0.3], [0.0, 0.0, 0.3, 0.9]]).double()


def law(**changes: object) -> RowLaw:
    return RowLaw(**{"dim": 4, "num_uniforms": 2, "num_normals": 1, "middle": middle, "heads": HEADS, **changes})  # type: ignore[arg-type]


WANTED = torch.arange(3000) % 3


@pytest.mark.parametrize("changes", [{}, {"root": ROOT}, {"heads": ()}])
@pytest.mark.parametrize("tries", [1, 40])
def test_row_alone_is_the_row_in_the_set(changes: dict[str, object], tries: int) -> None:
    """Whatever other rows are drawn beside it, and in pieces of any size: to a few units of float32's last place."""
    drawer = RowDrawer(law(**changes), KEY, tries)
    rows, labels = drawer.draw(np.arange(3000), WANTED)
    for numbers in (np.array([0]), np.array([17]), np.array([5, 6, 900, 2999]), np.arange(100, 1500)):
        alone, alone_labels = drawer.draw(numbers, WANTED[numbers])
        assert torch.allclose(alone, rows[numbers], rtol=1e-6, atol=1e-9)
        assert torch.equal(alone_labels, labels[numbers])


def test_rows_differ_by_number_seed_and_class() -> None:
    drawer = RowDrawer(law(heads=()), KEY, 1)
    rows, _ = drawer.draw(np.arange(500), torch.zeros(500, dtype=torch.int64))
    assert len(rows[:, 0].unique()) == 500
    other, _ = RowDrawer(law(heads=()), KEY + 1, 1).draw(np.arange(500), torch.zeros(500, dtype=torch.int64))
    assert not bool((other == rows).any())


def test_no_generator_of_torch_or_numpy_has_a_say() -> None:
    """Their seeds change nothing, and rows leave their streams where they were."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr,call-overload,index]
        found.append(rows_of(law(), WANTED, tries=20)[0])
        assert torch.equal(torch.random.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[call-overload,index]
    assert torch.equal(found[0], found[1])


_OTHER_PROCESS = """
import torch, sys
from tests.common.generator.test_row_law import WANTED, law
from tests.row_cases import rows_of
assert torch.get_num_threads() == int(sys.argv[1])
torch.save(rows_of(law(), WANTED, tries=20), sys.argv[2])
"""


def test_rows_are_the_same_on_one_thread_and_on_two(tmp_path: object) -> None:
    found = []
    for threads in ("1", "2"):
        file = f"{tmp_path}/{threads}.pt"
        subprocess.run(
            [sys.executable, "-c", _OTHER_PROCESS, threads, file],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
        found.append(torch.load(file))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6, atol=1e-9)
    assert torch.equal(found[0][1], found[1][1])


def posterior_of(rows: Tensor, head: LinearHead) -> Tensor:
    return (rows.double() @ head.weight.T + head.bias).argmax(1)


@pytest.mark.parametrize("root", [None, ROOT])
def test_rows_have_the_class_that_the_posterior_gives_them(root: Tensor | None) -> None:
    """The K numbers that a try judges are the row's own noise: its scores are those of the finished row."""
    for tries in (1, 200):
        drawer = RowDrawer(law(heads=HEADS[:1], middle=one_head, root=root), KEY, tries)
        rows, labels = drawer.draw(np.arange(3000), WANTED)
        assert torch.equal(posterior_of(rows, HEADS[0]), labels)
        assert torch.equal(labels, WANTED) is (tries > 1)


def one_head(labels: Tensor, uniform: Tensor, normal: Tensor) -> Middle:
    tried = middle(labels, uniform, normal)
    return Middle(tried.means, tried.scale, torch.zeros_like(labels))


def plain(asked: Tensor, generator: torch.Generator, root: Tensor) -> tuple[Tensor, Tensor]:
    """The same law by torch's numbers, noise drawn whole: rows and the classes that they get."""
    count = len(asked)
    uniform = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    tried = middle(asked, uniform, torch.randn(count, 1, generator=generator, dtype=torch.float64))
    noise = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    rows = tried.means + tried.scale * (noise @ root.T)
    scores = torch.stack([rows @ head.weight.T + head.bias for head in HEADS])[tried.head, torch.arange(count)]
    return rows, scores.argmax(1)


@pytest.mark.parametrize("tries", [1, 400])
def test_law_is_that_of_plain_draws(tries: int) -> None:
    """Per class asked for: shares of the classes that come out, mean and covariance, to five standard errors."""
    generator, count = torch.Generator().manual_seed(0), 40_000
    asked = torch.arange(count) % 3
    rows, labels = rows_of(law(root=ROOT), asked, 3, tries)
    due_rows, due_labels = plain(asked.repeat(20), generator, ROOT)
    due_asked = asked.repeat(20)
    for wanted in range(3):
        mine, due = asked == wanted, due_asked == wanted
        if tries > 1:
            assert bool((labels[mine] == wanted).all())
            due &= due_labels == wanted
        shares, due_shares = (part.bincount(minlength=3) / len(part) for part in (labels[mine], due_labels[due]))
        few = min(int(mine.sum()), int(due.sum()))
        assert float((shares - due_shares).abs().max()) < 5 * few**-0.5
        ours, theirs = rows[mine].double(), due_rows[due]
        spread = float(theirs.var(0).max())
        assert float((ours.mean(0) - theirs.mean(0)).abs().max()) < 5 * (2 * spread / few) ** 0.5
        assert float((ours.T.cov() - theirs.T.cov()).abs().max()) < 5 * spread * (4 / few) ** 0.5


def test_class_that_can_not_be_had_stays_short() -> None:
    """A head that never finds class 2: its rows stand with the class of the last try, and the work is bounded."""
    never = LinearHead(_WEIGHT, torch.tensor([0.6, 0.0, -1e6], dtype=torch.float64))
    asked: list[int] = []

    def counted(labels: Tensor, uniform: Tensor, normal: Tensor) -> Middle:
        asked.append(len(labels))
        return one_head(labels, uniform, normal)

    rows, labels = rows_of(law(heads=(never,), middle=counted), WANTED, tries=16)
    assert len(asked) == 16
    assert set(labels[WANTED == 2].tolist()) == {0, 1}
    assert float((labels[WANTED < 2] == WANTED[WANTED < 2]).float().mean()) > 0.98
    assert torch.equal(posterior_of(rows, never), labels)


def test_nudge_moves_only_what_stands_on_the_border() -> None:
    """With equal scores a nudge decides between classes 0 and K - 1; away from a border it changes nothing."""
    drawer = RowDrawer(law(), KEY, 20)
    rows, labels = drawer.draw(np.arange(3000), WANTED)
    for nudge in (1e-9, -1e-9):
        again, again_labels = drawer.draw(np.arange(3000), WANTED, nudge)
        assert torch.equal(again, rows)
        assert torch.equal(again_labels, labels)
    even = LinearHead(torch.zeros(3, 4).double(), torch.zeros(3).double())
    tied = RowDrawer(law(heads=(even,), middle=one_head), KEY, 1)
    for nudge, label in ((0.0, 0), (-1e-9, 0), (1e-9, 2)):
        assert set(tied.draw(np.arange(50), WANTED[:50], nudge)[1].tolist()) == {label}


def test_columns_that_say_nothing_leave_the_noise_as_it_is() -> None:
    """Zero and equal columns: no direction is seen, or one, and rows stay finite with their whole variance."""
    for weight in (
        torch.zeros(3, 4),
        torch.ones(3, 4),
        torch.tensor([[1.0, 0, 0, 0], [1.0, 1e-12, 0, 0], [1, 0, 0, 0]]),
    ):
        head = LinearHead(weight.double(), torch.tensor([0.1, 0.0, 0.0]).double())
        still: Callable[..., Middle] = lambda labels, uniform, normal: Middle(  # noqa: E731
            torch.zeros(len(labels), 4).double(), torch.ones(len(labels), 1).double(), torch.zeros_like(labels)
        )
        rows, labels = rows_of(law(heads=(head,), middle=still), torch.zeros(20_000).long(), tries=3)
        assert bool((labels == 0).all())
        assert torch.allclose(rows.T.cov(), torch.eye(4), atol=0.05)
