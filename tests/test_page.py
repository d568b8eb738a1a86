"""These tests check that the page of a problem shows the numbers of the training step, in a real browser if there is
one."""

import copy
import functools
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_group import a_row

from data.loader import Data, encode_problems, load_problems
from figures.page import CUTS, page_content, page_html
from loss import entropy_clip, token_weights
from methods import METHODS, Method, variant
from model import load_model
from reward import MATH
from step import Batch, Run, mini_batch_tokens, rollout_batch
from support.config import Config

# the tests need right and wrong rows: of 8 rows of the problem `train-0304`, the base model has 3 right
BASE, ID = Path("data/base"), "train-0304"
HOSTILE = ["</script><script>window.hacked = 1</script>", "<img src=x onerror=window.hacked=1>", "'\"`${1}&lt;"]
HOSTILE += ["a\nb", "\u2028", "😀", "\x00", "DATA"]
WEIGHTS = """controls.method.value = arguments[0]; controls.cut.value = arguments[1];
return rowsOfGroup().map((row) => [row.label, row.tokens.map((token) => token.weight)])"""
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync"


@pytest.fixture(scope="module")
def content() -> dict:
    """Returns the page's content for two models: the shipped base model, and the same model by another name."""
    content = page_content([BASE], ID)
    content["models"].append(content["models"][0] | {"name": "again"})
    return content


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """shown(content) opens a page with this content in a browser, and returns the browser."""
    selenium, folder = pytest.importorskip("selenium.webdriver"), tmp_path_factory.mktemp("chromium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={folder}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))

    def show(content: dict):
        (folder / "page.html").write_text(page_html(content), encoding="utf-8")
        browser.get((folder / "page.html").as_uri())
        assert not browser.get_log("browser")  # the page's script ran without an error
        return browser

    yield show
    browser.quit()


def text(page, selector: str) -> str:
    return page.find_element("css selector", selector).text


def test_every_weight_is_that_of_a_training_step(content, shown):
    """For each method, the weights on the page equal those that rollout_batch and token_weights compute, with half of
    the demonstration as prefix."""
    problem = next(problem for problem in load_problems(Config.data) if problem.id == ID)
    model, tokenizer = load_model(str(BASE))
    encoded, *_ = encode_problems(tokenizer, [problem], Config.max_response_tokens, [tokenizer.eos_token_id], MATH)

    def a_run(method: Method) -> Run:
        return Run(Config(), method, model, tokenizer, MATH, Data([problem], encoded, encoded, {}), None)

    @functools.cache
    def sampled(rows: str, baseline: str | None, scale_by_std: bool | None) -> Batch:
        method = Method("", rows, schedule="constant", baseline=baseline, scale_by_std=scale_by_std)
        return rollout_batch(a_run(method), [0], 0)

    page, names = shown(content), [method["name"] for method in content["methods"]]
    assert sorted(names + content["missing"]) == sorted(METHODS) and len(names) >= 22
    for name in names:
        method = METHODS[name]
        batch = sampled(method.rows, method.baseline, method.scale_by_std)
        # a method without reinforcement learns only from row 7, the group's demonstration
        rows = torch.arange(8) if "rl" in method.stages else torch.tensor([7])
        demonstration_tokens = int(batch.rollouts.prefix_mask[rows].sum())
        normalizer = 8 * Config.max_response_tokens if len(rows) == 8 else demonstration_tokens
        weights = token_weights(method, mini_batch_tokens(a_run(method), batch, rows, normalizer, 0.0, ()))
        on_page = sorted(page.execute_script(WEIGHTS, name, CUTS.index(50)))  # the page's rows by their numbers
        for i, (_, row) in zip(rows, on_page, strict=True):
            expected = weights[i, batch.rollouts.response_mask[i]].tolist()
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-9), name


def test_the_clip_ranks_as_the_loss_does(content, shown):
    page, generator = shown(content), torch.Generator().manual_seed(0)
    # With n = 7 the group has 10 prefix tokens, 7 in one row and 3 in another. At keep = 0.9 the entropy clip must
    # drop one of the 10 tokens, although (1 - 0.9) * 10 is below 1 in floats.
    for n in (0, 1, 7, 37):
        # some entropies are equal, because they are rounded to eighths
        entropy = (torch.rand(3, 60, generator=generator) * 8).round() / 8
        mask = torch.zeros(3, 60, dtype=torch.bool)
        mask[2, :n] = mask[0, : n // 2] = True
        rows = [{"entropy": e.tolist(), "given": int(m.sum()), "ids": [0] * 60} for e, m in zip(entropy, mask)]
        for keep in (0, 5, 20, 33, 90, 100):
            for select in ("high", "low"):
                method = {"clip": select, "clips_all": False}
                kept = page.execute_script("return entropyClip(...arguments)", rows, method, keep / 100)
                expected = entropy_clip(mask, entropy, keep / 100, select)
                assert kept == [e[m].tolist() for e, m in zip(expected, mask)], (n, keep, select)


def test_a_hand_moves_everything(content, shown):
    """After the controls of the page are moved, its numbers for a hybrid row equal those computed from the group's
    rewards."""
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.select import Select

    page, rows = shown(content), content["models"][0]["rows"]
    page.find_element("id", "cut").send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * CUTS.index(80))
    page.find_element("id", "keep").send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 33)
    page.find_element("id", "model").send_keys(Keys.ARROW_RIGHT)
    Select(page.find_element("id", "method")).select_by_visible_text("prefix-rft")
    hybrid = rows[8 + CUTS.index(80)]
    advantage = hybrid["reward"] - sum(row["reward"] for row in rows[:7]) / 7
    n, kept = hybrid["given"], hybrid["given"] - int(0.67 * hybrid["given"] + 1e-9)
    assert n == int(0.8 * (len(rows[8]["ids"]) - 1)) and hybrid["reward"] == 1 > advantage > 0
    assert text(page, "output[for=cut]") == f"80%: {n} tokens given"
    assert text(page, "output[for=keep]") == f"keeps 33%: {kept} of {n} tokens"
    assert text(page, "output[for=model]") == "again (2 of 2)"
    assert text(page, "#sums").splitlines()[:2] == ["prefix", f"{kept * advantage:.4g}"]
    place = max(range(n), key=lambda t: hybrid["entropy"][t])
    ActionChains(page).move_to_element(page.find_element("css selector", f"[data-place='{place}']")).perform()
    token = text(page, "#token")
    assert f"prefix, token {place + 1} of row 8 hybrid" in token and f"{hybrid['entropy'][place]:.4g}" in token
    assert f"w = I·A·r = 1·{advantage:.4g}·1 = +{advantage:.4g}" in token and "kept" in token
    page.find_element("css selector", "[tabindex='0']").send_keys(*[Keys.ARROW_RIGHT] * (n - place))
    assert f"continuation, token {n + 1} of row 8 hybrid" in text(page, "#token")
    assert "w = I·A·r = 1·1·1 = +1" in text(page, "#token")
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert "of row 1 on-policy" in text(page, "#token")
    Select(page.find_element("id", "method")).select_by_visible_text("luffy")
    assert not page.find_element("id", "cut").is_enabled() and text(page, "#sums").startswith("demonstration")


def test_texts_of_others_are_shown_and_nothing_runs(content, shown):
    content = copy.deepcopy(content)
    model, tokens = content["models"][0], 4000
    model["texts"] = {id: HOSTILE[int(id) % len(HOSTILE)] for id in model["texts"]}
    ids = [int(id) for id in model["texts"]]
    model["rows"][0] |= {"ids": (ids * tokens)[:tokens], "p": [0.5] * tokens, "entropy": [0.5] * tokens}
    for group in itertools.chain.from_iterable(model["groups"].values()):
        group["weights"][0] = [[0.5, tokens]] if group["rows"][0] == 0 else group["weights"][0]
    model |= {"name": HOSTILE[1], "prompt": HOSTILE[0]}
    page = shown(content | {"answer": HOSTILE[0]})
    cells = page.execute_script("return shown[1].cells.map((cell) => cell.textContent)")
    seen = [hostile.replace(" ", "·").replace("\n", "↵").replace("\u2028", "↵") for hostile in HOSTILE]
    assert cells == [seen[ids[t % len(ids)] % len(HOSTILE)] for t in range(tokens)]
    assert text(page, "#problem") == text(page, "#answer") == HOSTILE[0]
    assert HOSTILE[1] in text(page, "output[for=model]")
    assert page.execute_script("return window.hacked === undefined && document.querySelector('img') === null")


def test_it_can_be_read_on_a_phone_and_in_the_dark(content, shown):
    page = shown(content)
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    smallest, width, paper = page.execute_script(
        "return [Math.min(...[...document.body.querySelectorAll('*')].map((e) => parseFloat(getComputedStyle(e)"
        ".fontSize))), document.scrollingElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
    )
    assert smallest >= 12 and width <= 360 and paper == "rgb(22, 22, 22)"


# ---- what it is made from


@pytest.fixture
def folder(tmp_path) -> Path:
    """Returns a run folder whose data have no demonstrations, and whose log has a group of the second problem."""
    problems = [{"id": name, "problem": "329;Cr;B-7;A+4?", "answer": name} for name in "12"]
    group = {"step": 1, "method": "rft", "id": "2", "problem": "", "answer": "", "prompt": [], "rows": [a_row("ab")]}
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, problems)))
    (tmp_path / "config.json").write_text(json.dumps({"method": "rft", "data": str(data)}))
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "groups.jsonl").write_text(json.dumps(group) + "\n")
    shutil.copytree(BASE, tmp_path / "final")
    return tmp_path


def test_a_run_without_demonstrations_and_a_new_method_are_shown(folder, monkeypatch, shown):
    monkeypatch.setitem(METHODS, "mine", variant(METHODS["rft"], baseline="group"))
    content = page_content([folder])
    methods = {method["name"] for method in content["methods"]}
    assert methods == {name for name, method in METHODS.items() if not method.needs_demonstrations}
    page = shown(content)
    assert text(page, "#answer") == "2" and "8 on-policy" in text(page, "#rows")
    assert text(page, "output[for=cut]") == "plays no part here"


def test_what_cannot_be_shown_is_one_line(folder, refused):
    def message(*words: object) -> str:
        return refused("plot.py", "--page", folder, *words)

    assert "'1' has no demonstration" in message("--problem", "1")
    assert "'11' is not in the data: did you mean 1?" in message("--problem", "11")
    next((folder / "final").glob("*.safetensors")).unlink()
    assert "holds no *.safetensors" in message()
    (folder / "groups.jsonl").unlink()
    assert "has no groups.jsonl" in message()
    (folder / "config.json").write_text('{"reward": "own.py"}')
    assert "was graded by own.py" in message()
