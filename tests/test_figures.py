"""Figures show the numbers they were given."""

import sys

import numpy as np
import pytest
import torch

from latent_engine.extras import MissingExtraError
from latent_engine.figures import (
    COLORS,
    comparison,
    image_grid,
    interpolations,
    latent_scatter,
    manifold,
    model_sheet,
    montage,
    pairs,
    plane,
    training_curves,
    traversals,
)

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb


@pytest.fixture
def space():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3 + 4
    return torch.randn(60, 2, generator=generator) + y[:, None], y, torch.tensor([[4.0, 4.0], [5.0, 5.0]])


def as_rows(array):
    return sorted(map(tuple, np.asarray(array, np.float64).round(4).tolist()))


def test_scatter_shows_every_point_in_the_colour_of_its_class(space, tmp_path):
    z, y, means = space
    axes = latent_scatter(z, y, means).axes[0]
    points, markers = axes.collections[0], axes.collections[-1]
    colors = np.array([to_rgb(COLORS[label]) for label in y - 4])
    drawn = np.hstack([points.get_offsets(), points.get_facecolors()[:, :3]])
    assert as_rows(drawn) == as_rows(np.hstack([z, colors]))
    assert as_rows(markers.get_offsets()) == as_rows(means)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["4", "5", "6", "component\nmean"]
    assert axes.get_aspect() == 1
    latent_scatter(z).savefig(tmp_path / "plain.png")
    assert (tmp_path / "plain.png").stat().st_size > 1000


def test_the_plane_of_a_high_dimensional_space_is_that_of_its_principal_components():
    decomposition = pytest.importorskip("sklearn.decomposition")
    z = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1, 6)
    pca = decomposition.PCA(2).fit(z.numpy())
    origin, directions = plane(z)
    assert np.allclose(origin, pca.mean_)
    assert np.allclose(np.abs((directions.numpy() * pca.components_).sum(1)), 1)
    assert torch.equal(plane(z[:, :2])[1], torch.eye(2, dtype=torch.float64))
    assert latent_scatter(z).axes[0].get_xlabel() == "first principal component"
    with pytest.raises(ValueError, match=r"D of at least 2, given \[50, 1\]"):
        plane(z[:, :1])


def test_montage_puts_images_row_by_row_as_ink_on_white():
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 1, 2, 3) / 4
    sheet = montage(images, columns=3)
    assert sheet.shape == (2 * 2 + 1, 3 * 3 + 2)
    assert sheet[0, [0, 4, 8]].tolist() == [1, 0.75, 0.5] and sheet[3, [0, 4]].tolist() == [0.25, 0]
    assert (sheet[2] == 1).all() and (sheet[3:, 8:] == 1).all()
    assert montage(torch.zeros(4, 3, 2, 3), columns=2, gap=0).shape == (4, 6, 3)


def test_the_manifold_is_a_grid_of_equal_probability():
    z = manifold(4)
    normal = torch.distributions.Normal(0.0, 1.0)
    cells = normal.cdf(z).view(4, 4, 2)
    quarters = torch.tensor([1, 3, 5, 7]) / 8
    assert torch.allclose(cells[..., 0], quarters.expand(4, 4)) and torch.allclose(cells[..., 1], quarters.flip(0)[:, None])
    assert z.shape == (16, 2) and manifold(1).tolist() == [[0, 0]]


def test_traversals_change_one_dimension_and_interpolations_end_where_they_should():
    z = torch.tensor([1.0, 2.0, 3.0])
    walks = traversals(z, [2, 0], torch.tensor([-1.0, 0.0, -3.0]), torch.tensor([1.0, 0.0, 5.0]), steps=3)
    assert walks.tolist() == [[1, 2, -3], [1, 2, 1], [1, 2, 5], [-1, 2, 3], [0, 2, 3], [1, 2, 3]]
    lines = interpolations(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[4.0, 2.0], [1.0, 0.0]]), steps=3)
    assert lines.tolist() == [[0, 0], [2, 1], [4, 2], [1, 1], [1, 0.5], [1, 0]]


def test_pairs_lie_below_each_other():
    images = torch.arange(5.0).view(5, 1, 1, 1)
    assert pairs(images, -images, columns=2).flatten().tolist() == [0, 1, 0, -1, 2, 3, -2, -3]
    assert len(pairs(images, images, columns=10)) == 0


def test_curves_have_one_panel_for_each_quantity():
    figure = training_curves([{"epoch": 1, "loss": 5.0}, {"epoch": 2, "loss": 3.0, "purity": 0.5}])
    assert [axes.get_title() for axes in figure.axes] == ["loss", "purity"]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 5], [2, 3]]
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[2, 0.5]]


def test_sheet_and_grid(space, tmp_path):
    z, y, means = space
    sheet = model_sheet(z, y, means, torch.rand(100, 1, 8, 8), torch.rand(2, 1, 8, 8), ["0: 40 %", "1: 60 %"])
    sheet.savefig(tmp_path / "sheet.png")
    assert "1: 60 %" in [text.get_text() for axes in sheet.subfigs[1].axes for text in axes.texts]
    image_grid(torch.rand(7, 3, 8, 8), columns=4, title="seven").savefig(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_missing_matplotlib_names_the_extra(space, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'latent-engine\[plot\]'"):
        latent_scatter(space[0])


def test_comparison_puts_counterparts_side_by_side_in_sets():
    """Seven images of one value each, in three sets a row: image 5 and its counterparts are in the third set, second row."""
    values = torch.arange(7.0)[:, None, None, None] / 20
    images = {"input": values.expand(7, 1, 4, 6), "first": values.expand(7, 1, 4, 6) + 0.4,
              "second": values.expand(7, 1, 4, 6) + 0.6}
    figure = comparison(images, sets=3)
    assert figure.get_suptitle() == "In each set: input, first, second" and len(figure.axes) == 3
    for column, axes in enumerate(figure.axes):
        picture = np.asarray(axes.images[0].get_array())
        for row, number in enumerate(range(column, 7, 3)):
            ink = [1 - picture[8 * row + 3, 10 * place + 4] for place in range(3)]
            assert ink == pytest.approx([number / 20, number / 20 + 0.4, number / 20 + 0.6], abs=1e-6)
    few = comparison({"input": torch.zeros(2, 3, 4, 4), "other": torch.ones(2, 3, 4, 4)})
    assert len(few.axes) == 2
