"""The report of a made-up store whose numbers are known."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import scipy.stats

from experiments.__main__ import main
from experiments.config import Config, ConfigError
from experiments.methods import METHODS
from experiments.report import figures, records, statistics, style
from experiments.report.write import write
from experiments.store import Store
from tests.support import stores

RECORDS = stores.sweep()
JOBS = RECORDS[1:-2]
"""Without the first job's older record, the failed job and the benchmark."""

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    for record in RECORDS:
        Store(folder / "results.jsonl").append(record)
    return folder


@pytest.fixture(scope="module")
def document(folder):
    return write([folder])


@pytest.fixture(scope="module")
def page(folder, document):
    return Page((folder / "report" / "report.html").read_text())


class Page(html.parser.HTMLParser):
    """Tags, and tables as lists of rows by the title that stands at their box."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.tables, self.rows, self.open = text, [], {}, None, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if found.get("class") == "scroll":
            self.rows = self.tables[found["aria-label"]] = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "use", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in ("meta", "use", "path", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def _accuracies(recipe, method, sparsity):
    """By seed, straight from the records."""
    found = {}
    for record in JOBS:
        config = record["config"]
        same = config["dataset"] == stores.RECIPES[recipe]["dataset"]
        if same and (config["method"], config["sparsity"]) == (method, sparsity):
            found[config["seed"]] = record["metrics"]["test_accuracy"]
    return {seed: value for seed, value in found.items() if value is not None}


def _slow_holm(p_values):
    """By the definition: step down, and never below a p-value that went before."""
    corrected, running = {}, 0.0
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, (len(p_values) - step) * p_values[index])
        corrected[index] = min(1.0, running)
    return [corrected[index] for index in range(len(p_values))]


def test_holm_is_its_definition():
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 21):
        p_values = list(rng.uniform(0, 0.3, size) ** 3)
        np.testing.assert_allclose(statistics.holm(p_values), _slow_holm(p_values), rtol=1e-12)
    assert statistics.holm([]) == []
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])


def test_differences_are_those_of_a_paired_t_test_over_the_seeds_that_both_have(document):
    for recipe, panel in enumerate(document["panels"]):
        for sparsity in stores.SPARSITIES:
            pairs = [pair for pair in panel["differences"] if pair["sparsity"] == sparsity]
            assert len(pairs) == 21
            p_values = []
            for pair in pairs:
                a = _accuracies(recipe, pair["better"], sparsity)
                b = _accuracies(recipe, pair["other"], sparsity)
                seeds = sorted(a.keys() & b.keys())
                assert pair["seeds"] == seeds
                test = scipy.stats.ttest_rel([a[s] for s in seeds], [b[s] for s in seeds])
                interval = test.confidence_interval(0.95)
                assert pair["p"] == pytest.approx(test.pvalue)
                assert (pair["low"], pair["high"]) == pytest.approx((interval.low, interval.high))
                assert pair["mean"] == pytest.approx(np.mean([a[s] - b[s] for s in seeds]))
                assert pair["mean"] >= 0
                p_values.append(test.pvalue)
            assert [pair["p_holm"] for pair in pairs] == pytest.approx(_slow_holm(p_values))
            assert [pair["apart"] for pair in pairs] == [p < 0.05 for p in _slow_holm(p_values)]


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_four_in_five_tests_find_what_they_are_said_to_find(n):
    rng, trials = np.random.default_rng(0), 40_000
    values = rng.normal(statistics.detectable(n), 1.0, (trials, n))
    share = np.mean(scipy.stats.ttest_1samp(values, 0.0, axis=1).pvalue < 0.05)
    assert share == pytest.approx(0.8, abs=5 * np.sqrt(0.16 / trials))


@pytest.mark.parametrize("second", [(0.8, 0.8, 0.8), (0.81, 0.91, 0.71), (0.9, None, None)])
def test_equal_differences_and_single_seeds_are_not_tested(second):
    first = (0.8, 0.9, 0.7) if second != (0.8,) * 3 else second
    values = {"dpai": first, "snip": second}
    jobs = [
        stores.record(Config(method=method, sparsity=0.9, seed=seed), accuracy, best=accuracy)
        for method, accuracies in values.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    (panel,) = records.panels(jobs)
    (pair,) = statistics.differences(panel, 0.9)
    assert pair.p is None
    assert not pair.apart


def test_every_accuracy_on_the_page_is_that_of_the_records(page):
    for recipe, title in enumerate(("resnet20 on cifar10", "vgg19 on cifar100")):
        head, *rows = page.tables[f"{title}: test accuracy"]
        assert head == ["method", "68.38%", "90%", "96.84%", "99%", "99.68%"]
        assert [row[0] for row in rows] == list(stores.METHODS)
        for method, *cells in rows:
            for sparsity, cell in zip(stores.SPARSITIES, cells, strict=True):
                values = 100 * np.array(list(_accuracies(recipe, method, sparsity).values()))
                shown = f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
                if recipe == 0 and (method, sparsity) == stores.MISSING[:2]:
                    shown += " †"
                if recipe == 0 and (method, sparsity) == stores.DIVERGED[:2]:
                    shown += " (1 of 3 diverged)"
                assert cell == shown


def test_every_row_names_the_records_that_it_stands_on(page, folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    head, *rows = page.tables["resnet20 on cifar10"]
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        file, _, numbers = cells["records"].partition(":")
        assert file == "results.jsonl"
        members = [json.loads(lines[int(number) - 1]) for number in numbers.split(", ")]
        assert {member["config"]["method"] for member in members} == {cells["method"].split()[0]}
        assert cells["seeds"] == f"{len(members)} of 3"
        best = [member["metrics"]["best_test_accuracy"] for member in members]
        best = [100 * value for value in best if value is not None]
        assert cells["best %"] == f"{np.mean(best):.1f} ± {np.std(best, ddof=1):.1f}"
        nodes = [member["metrics"]["topology"]["nodes"] for member in members]
        assert cells["nodes"] == f"{np.mean(nodes):,.0f}"
    _, first, *_ = page.tables["Every job"]
    assert first[0].endswith("results.jsonl:2")  # line 1 is replaced by it
    assert len(page.tables["Every job"]) == 1 + len(JOBS)


def test_pruning_times_are_those_of_the_records(page):
    _, *rows = page.tables["Seconds of pruning"]
    assert len(rows) == 14
    for title, method, mean, least, most, jobs in rows:
        seconds = [
            record["metrics"]["prune_seconds"]
            for record in JOBS
            if record["config"]["method"] == method and record["config"]["dataset"] in title.split()
        ]
        assert mean == f"{np.mean(seconds):.2f} ± {np.std(seconds, ddof=1):.2f}"
        assert (least, most) == (f"{min(seconds):.2f}", f"{max(seconds):.2f}")
        assert jobs == f"{len(seconds)}"


def test_the_page_names_what_is_missing_and_where_it_comes_from(page, folder):
    for said in (
        "215 jobs finished; diverged: 1, failed: 1, seeds missing: 1",
        "resnet20 on cifar10: snip at 99.68%: 1 of 3 diverged",
        "resnet20 on cifar10: phew at 99%: no result for seed 2",
        "grasp 90%, seed 0: out of &lt;memory&gt;",
        f"python -m experiments report {folder}",
        "0123456789abcdef",
        "cpu a &lt;chip&gt;, cpu count 2",
        "python 3.11, jax 0.10.2",
        "epochs 160",
    ):
        assert said in page.text


def test_the_page_needs_no_network(page):
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert [tag for tag, _ in page.tags].count("svg") == 6
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    for _, found in page.tags:
        for name, value in found.items():
            if name in ("href", "xlink:href", "src"):
                assert value[1:] in ids
            elif not name.startswith("xmlns"):
                assert "://" not in (value or "")
    assert "@import" not in page.text
    assert set(re.findall(r"url\((.)", page.text)) == {"#"}


def test_figures_are_written_as_png_and_svg_that_turns_dark(document, folder):
    names = [file.rpartition("/")[2] for file in document["files"]]
    assert names[:3] == ["report.html", "accuracy.png", "accuracy.svg"]
    assert len(names) == 1 + 2 * 7
    for name in names:
        content = (folder / "report" / name).read_bytes()
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
        elif name.endswith(".svg"):
            assert content.count(b"prefers-color-scheme:dark") == 1
            used = set(re.findall(rb"(?:fill|stroke): (#\w+)", content))
            assert used <= {color.encode() for color in style.DARK}


def test_sparsities_are_evenly_spaced_and_named_in_percent(folder):
    panels = records.panels(records.read([folder]))
    axes = figures.accuracy(panels).axes[0]
    np.testing.assert_allclose(axes.get_xticks(), [0.5, 1, 1.5, 2, 2.5], atol=6e-3)
    named = [label.get_text() for label in axes.get_xticklabels()]
    assert named == ["68.38%", "90%", "96.84%", "99%", "99.68%"]


def test_a_layers_share_is_the_mean_over_seeds(folder):
    (panel, _) = records.panels(records.read([folder]))
    group = panel.at(0.9)[0]
    shares = figures.shares_by_layer(group, "nodes", "outputs")
    assert len(shares) == stores.LAYERS
    third = [record["metrics"]["topology"]["layers"][2] for record in group.records]
    assert shares[2] == pytest.approx(sum(layer["nodes"] / 16 for layer in third) / 3)


def test_every_method_has_a_look_of_its_own_on_light_and_on_dark():
    assert style.LOOKS.keys() == METHODS.keys()
    assert len(set(style.LOOKS.values())) == len(style.LOOKS)
    assert style.look("unheard-of") == style.look("unheard-of")
    variant, family = style.look("dpai[allocation=erk]"), style.look("dpai")
    assert variant.color == family.color
    assert variant.marker != family.marker
    for color, _ in style.LOOKS.values():
        assert _contrast(color, style.PAPER) >= 3
        assert _contrast(style.DARK[color], style.DARK[style.PAPER]) >= 3


def _contrast(first, second):
    """The ratio of luminances, as WCAG 2 defines it."""

    def luminance(color):
        parts = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_recipes_on_one_network_are_told_apart_by_what_differs():
    jobs = [
        stores.record(Config(sparsity=0.9, epochs=epochs), 0.9, best=0.9) for epochs in (10, 20)
    ]
    titles = [panel.title for panel in records.panels(jobs)]
    assert titles == ["resnet20 on digits, epochs 10", "resnet20 on digits, epochs 20"]


def test_a_record_that_is_older_than_a_setting_is_of_the_same_job():
    job = stores.record(Config(sparsity=0.9), 0.9, best=0.9)
    older = stores.record(Config(sparsity=0.9), 0.8, best=0.8)
    del older["config"]["init"]
    (panel,) = records.panels([older, job])
    assert panel.groups[0].records == (job,)


def test_the_command_prints_tables_or_json(tmp_path, capsys):
    store = Store(tmp_path / "jobs.jsonl")
    for seed in range(2):
        config = Config(method="snip", sparsity=0.9, seed=seed)
        store.append(stores.record(config, 0.9, best=0.9))
    main(["report", str(store.path)])
    assert "resnet20 on digits" in capsys.readouterr().out
    main(["report", str(store.path), "--out", str(tmp_path / "out"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["panels"][0]["groups"][0]["test_accuracy"]["values"] == [0.9, 0.9]
    assert (tmp_path / "out" / "report.html").exists()
    again = (tmp_path / "out" / "report.html").read_bytes()
    main(["report", str(store.path), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "report.html").read_bytes() == again


@pytest.mark.parametrize(("method", "accuracy"), [("dense", 0.9), ("snip", None)])
def test_a_store_of_a_single_job_has_a_report(tmp_path, method, accuracy):
    store = Store(tmp_path / "results.jsonl")
    store.append(stores.record(Config(method=method), accuracy, best=accuracy))
    write([tmp_path])
    page = Page((tmp_path / "report" / "report.html").read_text())
    head, row = page.tables["resnet20 on digits"]
    assert dict(zip(head, row, strict=True))["seeds"] == "1 of 1"
    assert ("1 of 1 diverged" in page.text) == (accuracy is None)


def test_a_folder_without_jobs_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"got {tmp_path}"):
        write([tmp_path])
    Store(tmp_path / "rows.jsonl").append({"table": "step"})
    with pytest.raises(ConfigError, match="no job has a record"):
        write([tmp_path / "rows.jsonl"])


_MEASURE = """<script>addEventListener("load", () => {
const wide = [...document.querySelectorAll("main > *, figure, svg, .scroll")]
  .filter(part => part.getBoundingClientRect().right > innerWidth).length
const title = [innerWidth, document.documentElement.scrollWidth, wide,
  document.querySelectorAll("svg").length, getComputedStyle(document.body).backgroundColor,
  getComputedStyle(document.querySelector("svg path")).fill]
document.title = "measured " + JSON.stringify(title)})</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_the_page_on_a_phone_in_the_dark_without_overflow(page, tmp_path):
    # The least width of Chromium's window is 500 pixels, so the phone is a frame in it.
    (tmp_path / "page.html").write_text(page.text.replace("</body>", f"{_MEASURE}</body>"))
    frame = "<script>const get=f=>f.contentDocument.title</script>"
    frame += (
        '<iframe width=390 height=844 src=page.html onload="document.title=get(this)"></iframe>'
    )
    (tmp_path / "phone.html").write_text(frame)
    options = """--headless --no-sandbox --disable-gpu --no-first-run --disable-sync
        --disable-background-networking --disable-component-update --hide-scrollbars
        --allow-file-access-from-files --blink-settings=preferredColorScheme=0
        --dump-dom""".split()
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path}", f"file://{tmp_path}/phone.html"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    dark = "rgb(20, 23, 26)"  # the page's ground, and the figures'
    (measured,) = re.findall(r"<title>measured (.*)</title>", done.stdout)
    assert json.loads(measured) == [390, 390, 0, 6, dark, dark]
