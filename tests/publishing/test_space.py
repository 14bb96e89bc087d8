"""The Space: what it computes, the folder of it, and the page in a browser."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import SpaceCard
from PIL import Image

from rigpt_hf import version as version_module
from rigpt_hf.conversion import convert_model
from rigpt_hf.pictures import encoded
from rigpt_hf.pictures.rotation import draw_layer, draw_layers, draw_probabilities, layer_pictures, plain
from rigpt_hf.pictures.style import STYLE
from rigpt_hf.publishing.rotation_view import RotationView, View, load_subjects, turn_rigpt
from rigpt_hf.publishing.space import FILES, GRADIO, space_files
from rigpt_hf.symmetry import GaugeTransformation, haar
from rigpt_hf.version import __version__
from tests.evaluation.toys import tiny_gpt2, word_tokenizer
from tests.model.agreement import difference
from tests.models import tiny_model
from tests.processes import ROOT, free_port
from tests.tolerances import SYMMETRY


WORDS = "<s> The capital of France is Paris a city in Europe and it was not red blue house cat dog river two $x$ <b>"
PROMPT = "The capital of France is"
FALLEN_APART = 0.05  # total variation distance of what did not stand still, at least
SHOWN = 1e-4  # and of what did, on the page
# Widths of each picture, of what is seen of it, and of what its frame scrolls over.
FRAMES = """return [...document.querySelectorAll(".matplotlib")].map(frame =>
  [frame.querySelector("img").getBoundingClientRect().width, frame.clientWidth, frame.scrollWidth])"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`stock`: a GPT-2 with a tokenizer. `rigpt`: converted from it. `alone`: that without a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    words = [word if index < 2 else f" {word}" for index, word in enumerate(WORDS.split())]
    tokenizer = word_tokenizer(words + [f" w{index}" for index in range(61 - len(words))])
    stock = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = convert_model(stock)
    for folder, each in (("stock", stock), ("rigpt", model), ("alone", model)):
        each.save_pretrained(root / folder)
        if folder != "alone":
            tokenizer.save_pretrained(root / folder)
    return root


@pytest.fixture(scope="module")
def views(folders) -> RotationView:
    return RotationView(load_subjects(str(folders / "rigpt"), baseline=str(folders / "stock")))


@pytest.fixture(scope="module")
def turned(views) -> View:
    return views.at(PROMPT, 1.0)


# What is computed


def test_rigpt_stands_still_and_stock_gpt2_falls_apart(turned):
    rigpt, stock = turned.rigpt, turned.stock
    assert difference(rigpt.now.probabilities, rigpt.before.probabilities) <= SYMMETRY[torch.float32]
    assert rigpt.distance <= SYMMETRY[torch.float32]
    assert stock.distance > FALLEN_APART
    for pair in (rigpt, stock):
        assert pair.before.probabilities.sum().item() == pytest.approx(1)
    assert difference(stock.before.probabilities, rigpt.before.probabilities) <= SYMMETRY[torch.float32]


def test_the_export_falls_apart_too(folders):
    subjects = load_subjects(str(folders / "rigpt"))
    view = RotationView(subjects).at(PROMPT, 1.0)
    assert subjects.stock_name == "stock GPT-2"
    assert view.rigpt.distance <= SYMMETRY[torch.float32] and view.stock.distance > FALLEN_APART


def test_nothing_changes_where_nothing_is_turned(views, turned):
    view = views.at(PROMPT, 0.0)
    for pair, there in ((view.rigpt, turned.rigpt), (view.stock, turned.stock)):
        assert torch.equal(pair.now.probabilities, pair.before.probabilities) and pair.distance == 0
        assert torch.equal(pair.now.hidden_states, pair.before.hidden_states)
        assert pair.departures == [0.0] * 3 and view.angle == 0
        assert torch.equal(pair.before.probabilities, there.before.probabilities)
        assert not torch.equal(there.now.probabilities, there.before.probabilities)


def test_pictures_of_every_layer_change_in_both_and_only_rigpt_turned_along(turned):
    for pair in (turned.rigpt, turned.stock):
        for layer in range(3):
            before, now = layer_pictures(pair, layer)
            assert before.shape == (len(turned.tokens), 32)
            assert difference(now, before) > FALLEN_APART
        assert min(pair.changes) > FALLEN_APART
    assert max(turned.rigpt.departures) <= SYMMETRY[torch.float32]
    assert max(turned.stock.departures) > FALLEN_APART


def test_the_path_is_the_geodesic_of_the_symmetry(views):
    g = GaugeTransformation(
        views.subjects.rigpt.config, {"stream": haar(32, torch.Generator().manual_seed(3), special=True)[None]}
    )
    for t in (0.3, 1.0):
        view = views.at(PROMPT, t, seed=3)
        assert difference(view.rigpt.rotation, g.at(t).elements["stream"][0]) <= SYMMETRY[torch.float64]
        assert view.angle == pytest.approx(t * view.largest_angle) and 90 < view.largest_angle <= 180
        assert torch.equal(view.rigpt.rotation, view.stock.rotation)
    assert difference(views.at(PROMPT, 1.0, seed=4).rigpt.rotation, view.rigpt.rotation) > FALLEN_APART


def test_the_models_really_turn(views, turned):
    model = views.subjects.rigpt
    pairs = zip(model.parameters(), turn_rigpt(model, turned.rigpt.rotation).parameters(), strict=True)
    assert max(difference(after, before) for before, after in pairs if before.any()) > FALLEN_APART


def test_what_was_computed_is_kept(views, monkeypatch):
    view = views.at(PROMPT, 0.7)
    monkeypatch.setattr("rigpt_hf.publishing.rotation_view.observe", None)
    assert views.at(PROMPT, 0.7) is view
    with pytest.raises(TypeError):
        views.at(PROMPT, 0.71)


def test_what_cannot_be_shown_is_refused(views):
    for arguments, message in (
        ((PROMPT, 1.5, 0), "`t` must be between 0 .no rotation. and 1 .the whole one., got 1.5."),
        ((PROMPT, 0.5, -1), "`seed` must be a whole number between 0 and 2147483647, got -1."),
        ((PROMPT, 0.5, None), "`seed` must be a whole number between 0 and 2147483647, got None."),
        (("", 0.5, 0), "`prompt` must have 1 to 64 tokens, got 0. Write another one."),
        ((" it" * 65, 0.5, 0), "`prompt` must have 1 to 64 tokens, got 65. Write a shorter one."),
    ):
        with pytest.raises(ValueError, match=message):
            views.at(*arguments)


def test_models_that_cannot_be_shown_are_refused(folders, tmp_path):
    tiny_gpt2(vocab_size=60).save_pretrained(tmp_path / "smaller")
    tiny_gpt2().save_pretrained(tmp_path / "other")
    word_tokenizer(["<s>", *(f"v{index}" for index in range(60))]).save_pretrained(tmp_path / "other")
    shutil.copytree(folders / "rigpt", tmp_path / "distance")
    tiny_model(dtype=torch.float32, attention_score="distance").save_pretrained(tmp_path / "distance")
    for model, baseline, message in (
        (folders / "alone", None, "`model` must come with its tokenizer, got .*alone.*`tokenizer.save_pretr"),
        (folders / "stock", None, "`model` must be a RiGPT, got .*stock.* of model type 'gpt2'. Convert it"),
        (tmp_path / "absent", None, "`model` must be the folder of a saved model or the id .*, got .*absent"),
        (folders / "rigpt", "smaller", "`baseline` must have 61 tokens, got 60 in .*smaller"),
        (folders / "rigpt", "other", "`baseline` must have the tokenizer of the RiGPT, got another in .*other"),
        (tmp_path / "distance", None, "`baseline` must be given for .*distance.*, which no stock model computes"),
    ):
        with pytest.raises(ValueError, match=message):
            load_subjects(str(model), baseline=baseline and str(tmp_path / baseline))


# Pictures


@pytest.fixture
def coarse(monkeypatch):
    """Pictures of few pixels, which are drawn faster."""
    monkeypatch.setitem(STYLE, "figure.dpi", 30)


@pytest.mark.full
def test_pictures_are_drawn(views, turned, coarse):
    start = views.at(PROMPT, 0.0)
    drawings = {
        "probabilities": lambda view: draw_probabilities(view, views.subjects.tokenizer),
        "layer": lambda view: draw_layer(view, 1),
        "layers": draw_layers,
    }
    for name, draw in drawings.items():
        first, second = (rendered(draw(view)) for view in (start, turned))
        assert first.shape == second.shape and (first != second).any(), name
    assert torch.equal(rendered(draw_layers(turned)), second), "one view gives one picture"
    assert (rendered(draw_layer(turned, 0)) != rendered(draw_layer(turned, 1))).any()
    with pytest.raises(ValueError, match="`layer` must be between 0 .the embeddings. and 2, got 3"):
        draw_layer(turned, 3)


def test_tokens_are_labels_and_not_formulas(views, coarse):
    assert plain(" $x$\n") == r"·\$x\$\n"
    view = views.at("The $x$ <b> $x$", 0.0)
    assert (rendered(draw_layer(view, 1)) < 255).any()


def rendered(figure) -> torch.Tensor:
    """The pixels of a figure."""
    return torch.frombuffer(bytearray(Image.open(io.BytesIO(encoded(figure))).tobytes()), dtype=torch.uint8)


# The files


def test_the_files_are_a_space():
    files = space_files("someone/rigpt", revision="0123abc", baseline="openai/gpt2", title='A "title": with $signs')
    texts = {name: content.decode() for name, content in files.items()}
    assert set(texts) == FILES
    card = SpaceCard(texts["README.md"])
    assert (card.data.sdk, card.data.sdk_version, card.data.app_file) == ("gradio", GRADIO, "app.py")
    assert card.data.title == 'A "title": with $signs' and card.data.python_version == "3.11"
    assert card.data.models == ["someone/rigpt", "openai/gpt2"]
    assert len(card.data.short_description) <= 60  # the Hub refuses longer ones
    assert "$" not in card.text.replace("$signs", "") and "`0123abc`" in card.text
    settings = json.loads(texts["settings.json"])
    assert settings["model"] == "someone/rigpt" and settings["revision"] == "0123abc"
    assert settings["baseline"] == "openai/gpt2"
    compile(texts["app.py"], "app.py", "exec")
    pins = dict(line.split("==") for line in texts["requirements.txt"].splitlines())
    assert {"rigpt-hf", "torch", "transformers", "huggingface_hub", "matplotlib"} <= set(pins)
    assert pins["transformers"] == version("transformers")
    assert all(pin and "+" not in pin for pin in pins.values()), pins
    assert "gradio" not in pins  # the Space installs `sdk_version`


def test_a_space_installs_what_is_installed_here(monkeypatch):
    """The commit, where it comes from a server; of what nobody else can fetch the version."""
    git = {"url": "https://host.example/rigpt", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}}
    folder = {"url": "file:///home/me/rigpt", "dir_info": {"editable": True}}
    local = git | {"url": "file:///home/me/rigpt"}
    for origin, expected in (
        (git, "rigpt-hf @ git+https://host.example/rigpt@0123abc"),
        *((other, f"rigpt-hf=={__version__}") for other in (folder, local, {}, [], None)),
    ):
        installed = SimpleNamespace(read_text=lambda name, origin=origin: origin and json.dumps(origin))
        monkeypatch.setattr(version_module, "distribution", lambda name, installed=installed: installed)
        assert version_module.package() == expected == space_files("a/b")["requirements.txt"].decode().splitlines()[0]


def test_the_pinned_gradio_is_the_tested_one():
    try:
        installed = version("gradio")
    except PackageNotFoundError:
        pytest.skip("needs gradio")
    assert installed == GRADIO


def test_what_is_no_space_is_refused():
    for changed, message in (
        ({"model": "a/b/c"}, "`model` must be the id of a model on the Hub such as `someone/rigpt`, got 'a/b/c'"),
        ({"model": "runs/my model"}, "`model` must be the id .*, got 'runs/my model'. A Space cannot read folders"),
        ({"model": ""}, "`model` must be the id of a model on the Hub such as `someone/rigpt`, got ''"),
        ({"baseline": "gpt2--x"}, "`baseline` must be the id of a model on the Hub"),
        ({"revision": "a b"}, "`revision` must be a branch, tag or commit, got 'a b'. Give the commit to be sure."),
        ({"revision": ""}, "`revision` must be a branch, tag or commit, got ''"),
        ({"title": "two\nlines"}, "`title` must be one line with something in it, got 'two.nlines'"),
        ({"prompt": " "}, "`prompt` must be one line with something in it, got ' '"),
    ):
        with pytest.raises(ValueError, match=message):
            space_files(**{"model": "someone/rigpt"} | changed)


# The page


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium that finds no host but this one, and logs what it asks for."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip(f"needs {'chromedriver' if chromium else 'chromium'}")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--window-size=1280,2000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(folders, tmp_path):
    """The address of the app, as `python app.py` serves it."""
    pytest.importorskip("gradio", reason="needs gradio")
    space = tmp_path / "space"
    space.mkdir()
    for name, content in space_files("someone/rigpt").items():
        (space / name).write_bytes(content)
    port = free_port()
    environment = os.environ | {
        "RIGPT_SPACE_MODEL": str(folders / "rigpt"),
        "RIGPT_SPACE_BASELINE": str(folders / "stock"),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "hf"),
    }
    log = tmp_path / "app.log"
    with log.open("w") as lines:
        app = subprocess.Popen(
            [sys.executable, "app.py"], cwd=space, env=environment, stdout=lines, stderr=subprocess.STDOUT
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
        while not answers(address):
            assert app.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield address
    finally:
        app.kill()
        app.wait()


def answers(address: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(address, timeout=10).status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_the_page_in_a_browser(browser, page, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 60)

    def shown(kind: str) -> float:
        found = browser.find_elements(By.ID, f"{kind}-distance")
        return float(found[0].text or "nan") if found else float("nan")

    def picture(name: str) -> str:
        """The source of a picture that is there with a size."""
        image = wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, f"#{name} img"))[0]
        wait.until(lambda _: int(image.get_property("naturalWidth")) > 500 and image.size["height"] > 100)
        return image.get_attribute("src")

    browser.get(page)
    wait.until(lambda _: shown("stock") == 0)
    before = {name: picture(name) for name in ("probabilities", "pictures", "by-layer")}
    assert shown("rigpt") == 0

    slider = browser.find_element(By.CSS_SELECTOR, "#angle input[type=range]")
    slider.send_keys(Keys.END)
    wait.until(lambda _: shown("stock") > FALLEN_APART)
    assert shown("rigpt") <= SHOWN
    for name, source in before.items():
        wait.until(lambda _, name=name, source=source: picture(name) != source)
    whole = shown("stock")

    layer = picture("pictures")
    browser.find_element(By.CSS_SELECTOR, "#layer input[type=range]").send_keys(Keys.HOME)
    wait.until(lambda _: picture("pictures") != layer)
    screenshot = tmp_path / "space.png"
    assert browser.save_screenshot(str(screenshot)) and Image.open(screenshot).size[0] >= 1200

    # On a telephone everything is below each other, and nothing reaches beyond the screen.
    narrow = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    wait.until(lambda _: browser.execute_script("return window.innerWidth") == narrow["width"])
    widest = browser.execute_script("return document.documentElement.scrollWidth")
    assert browser.save_screenshot(str(tmp_path / "narrow.png")) and widest <= narrow["width"]
    # Pictures keep a size at which they can be read, and scroll in their frames.
    frames = browser.execute_script(FRAMES)
    assert len(frames) == 3
    for drawn, seen, scrolls in frames:
        assert drawn >= 600 > narrow["width"] > seen and scrolls >= drawn
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    for _ in range(60):
        slider.send_keys(Keys.ARROW_LEFT)
    wait.until(lambda _: "72.0°" in browser.find_element(By.TAG_NAME, "body").text)
    assert FALLEN_APART < shown("stock") != whole and shown("rigpt") <= SHOWN

    prompt = browser.find_element(By.CSS_SELECTOR, "#prompt textarea, #prompt input")
    turned = picture("probabilities")
    prompt.clear()
    prompt.send_keys("it was not a", Keys.ENTER)
    wait.until(lambda _: picture("probabilities") != turned)
    assert shown("rigpt") <= SHOWN
    prompt.send_keys(" it" * 65, Keys.ENTER)
    wait.until(lambda _: "`prompt` must have 1 to 64 tokens" in browser.find_element(By.TAG_NAME, "body").text)

    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    assert any(url.startswith(page) for url in asked)
    assert not [url for url in asked if url.startswith(("http", "ws")) and not url.startswith(page)]
