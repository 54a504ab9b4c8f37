"""The HTML explorer: what the page holds, and that it answers to pointer and keys in a real browser."""

import base64
import html
import io
import json
import re
import shutil
import subprocess

import pytest
import torch

from latent_engine.explorer import write_explorer

Image = pytest.importorskip("PIL.Image")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def decode(z):
    """Uniform images, brighter to the right and, half as much, upwards."""
    return (0.5 + z[:, 0] / 20 + z[:, 1] / 40).clamp(0, 1).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)


@pytest.fixture(scope="module")
def space():
    z = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) * 3
    return z, torch.linspace(0, 1, 300).view(-1, 1, 1, 1).expand(-1, 1, 16, 16), torch.arange(300) % 4


@pytest.fixture(scope="module")
def page(space, tmp_path_factory):
    z, images, y = space
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    return write_explorer(path, z, images, decode, y, z[:5], grid=12, title="</script> & <b>")


def content(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


def tile(part, index):
    sheet = Image.open(io.BytesIO(base64.b64decode(part["sheet"].partition(",")[2]))).convert("L")
    row, column = divmod(index, part["columns"])
    x, y = column * part["width"], row * part["height"]
    values = list(sheet.crop((x, y, x + part["width"], y + part["height"])).tobytes())
    return sum(values) / len(values) / 255


def test_page_holds_points_images_and_decodes(page, space):
    z, images, y = space
    data = content(page)
    assert torch.allclose(torch.tensor(data["points"]), z, atol=1e-4) and len(data["means"]) == 5
    assert data["codes"] == y.tolist() and data["classes"] == ["0", "1", "2", "3"]
    for i in (0, 17, 299):
        assert tile(data["images"], i) == pytest.approx(images[i].mean().item(), abs=0.03)
    left, right, bottom, top = data["extent"]
    for row, column in ((0, 0), (0, 11), (11, 0), (6, 3)):
        place = torch.tensor([[left + (column + 0.5) / 12 * (right - left), top - (row + 0.5) / 12 * (top - bottom)]])
        assert tile(data["decodes"], row * 12 + column) == pytest.approx(decode(place).mean().item(), abs=0.03)


def test_page_is_self_contained_and_its_title_is_harmless(page):
    text = page.read_text()
    assert not re.search(r"https?://|src=|href=|@import", text)
    assert text.count("</script>") == 2
    assert content(page)["title"] == "</script> & <b>"


def test_a_space_of_many_dimensions_is_cut_by_a_plane(tmp_path):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 6, generator=generator) * torch.tensor([5, 4, 0.1, 0.1, 0.1, 0.1]) + 3
    asked = []
    path = write_explorer(tmp_path / "page.html", z, torch.zeros(40, 3, 4, 4),
                          lambda p: asked.append(p) or torch.zeros(len(p), 3, 4, 4), grid=4)
    data = content(path)
    places = torch.cat(asked)
    assert places.shape == (16, 6) and "principal components" in data["plane"] and not data["labelled"]
    # The plane goes through the mean and keeps nearly all of the variance.
    assert torch.linalg.matrix_rank(places - z.mean(0), tol=1e-3) == 2
    assert torch.tensor(data["points"]).var(0).sum() == pytest.approx(z.var(0).sum().item(), rel=0.01)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found")
def test_browser_finds_points_and_decodes_under_the_pointer(page, space, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}", "--window-size=1200,900",
             "--virtual-time-budget=5000", "--dump-dom", f"file://{page}#selftest"]
    dom = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=120, check=True).stdout
    report = json.loads(html.unescape(re.search(r'data-selftest="([^"]*)"', dom)[1]))
    z, images, y = space
    assert report["points"] == 300
    for hit in report["hits"]:
        i = hit["found"]
        assert i == hit["expected"] and hit["text"] == f"Nearest image: row {i}, class {y[i]}"
        assert hit["at"] == pytest.approx(z[i].tolist(), abs=0.05)
        assert hit["datum"] == pytest.approx(images[i].mean().item(), abs=0.03)
        assert hit["decoded"] == pytest.approx(decode(z[i : i + 1]).mean().item(), abs=0.07)
    assert report["pinned"] and report["moved"] and report["hidden"]
    assert report["outside"] == "Outside the decoded area"
