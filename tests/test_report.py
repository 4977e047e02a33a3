"""The report shows what a run holds, says what is missing, and loads nothing from anywhere."""

import html
import json
import re
import shutil
import sys

import numpy as np
import pytest
import report_runs as made
from headless import CHROMIUM, browser

from panther_jax import report
from panther_jax.evaluation import statistics
from panther_jax.reporting import comparison, overlays, records

CASES = {"case_a": 5.0, "case_b": 4.0, "case_c": 6.0, "case_d": 0.0, "case_e": 5.0, "case_f": 3.0}
FOLDS = {
    "fold_0": {"case_a": 5.0, "case_b": 0.0, "case_c": 5.0},
    "fold_1": {"case_d": 2.0, "case_e": 4.0, "case_f": 3.0},
}
BLUE, ORANGE = (0x56, 0xB4, 0xE9), (0xFF, 0x8C, 0x1A)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Two runs over the same data: a cross-validation and a better one without its second fold."""
    root = tmp_path_factory.mktemp("original")
    made.make_data(root, CASES)
    made.make_run(root, "plain", FOLDS)
    better = {c: max(r, 3.0) for c, r in FOLDS["fold_0"].items()}
    made.make_run(root, "better", {"fold_0": better}, shift=0, lr=0.02)
    return root


@pytest.fixture
def root(original, tmp_path):
    copy = shutil.copytree(original, tmp_path / "data")
    for path in copy.glob("runs/*/*/*/summary.json"):
        path.write_text(path.read_text().replace(str(original), str(copy)))
    return copy


def run_report(*arguments, code=0):
    assert report.main([*map(str, arguments), "--quiet"]) == code


def page_of(run, *arguments):
    run_report("--run", run, *arguments)
    return (run / "report.html").read_text(encoding="utf-8")


def tables(page):
    """Cells of all tables by caption: the header, then the rows."""
    found = {}
    for body in re.findall(r"<table>(.*?)</table>", page, re.S):
        caption = html.unescape(re.search(r"<caption>(.*?)</caption>", body).group(1))
        rows = re.findall(r"<tr.*?>(.*?)</tr>", body, re.S)
        found[caption] = [
            [html.unescape(c) for c in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", r)] for r in rows
        ]
    return found


def sections_of(page):
    return re.findall(r'<h2 id="(\w+)">', page)


# ------------------------------------------------------------------------------------ contents


def test_a_cross_validation_tells_scores_by_fold_and_over_all_cases(root):
    run = root / "runs" / "plain"
    page = page_of(run)
    dice = made.dices(run, "fold_0") | made.dices(run, "fold_1")
    found = tables(page)
    overall = {row[0]: row for row in found["Over the cases, final checkpoint"]}
    assert overall["Dice tumor"][1:3] == ["6", f"{made.mean(dice.values()):.3f}"]
    assert overall["Dice tumor"][5] == f"{np.median(list(dice.values())):.3f}"
    assert overall["Dice tumor"][7] == f"{min(dice.values()):.3f}"
    # the same interval as `evaluate` writes: drawn from cases sorted by id
    interval = statistics.mean_interval(np.array([dice[c] for c in sorted(dice)]))
    assert overall["Dice tumor"][3] == f"{interval.low:.3f} to {interval.high:.3f}"
    by_fold = {row[0]: row for row in found["Means by fold, final checkpoint"]}
    for fold in FOLDS:
        assert by_fold[fold][2] == f"{made.mean(made.dices(run, fold).values()):.3f}"
    assert by_fold["all cases"][1] == "6" and by_fold["all cases"][-2:] == ["1", "1"]
    expected = ["failures", "scores", "overlays", "scatter", "curves", "cases", "settings"]
    assert sections_of(page) == expected


def test_failures_come_first_then_the_lowest_dice(root):
    found = tables(page_of(root / "runs" / "plain"))
    assert [row[:3] for row in found["Failures"][1:]] == [
        ["case_b", "fold_0", "missed: nothing predicted"],
        ["case_d", "fold_1", "false alarm: predicted, but not in the reference"],
    ]
    listed = [row[0] for row in found["All cases, worst first"][1:]]
    dice = made.dices(root / "runs" / "plain", "fold_0") | made.dices(
        root / "runs" / "plain", "fold_1"
    )
    rest = sorted(set(CASES) - {"case_b", "case_d"}, key=dice.get)
    assert listed == ["case_b", "case_d", *rest]


def test_settings_and_versions_are_there(root):
    found = tables(page_of(root / "runs" / "plain"))
    assert ["optim.lr", "0.01"] in found["Settings"]
    versions = found["Versions, device and command, fold_0"]
    assert ["packages.jax", "0.10.2"] in versions and ["device", "1 x cpu"] in versions


def test_worst_median_and_best_are_pictured_with_both_outlines(root):
    page = page_of(root / "runs" / "plain", "--num-worst", 1)
    titles = [html.unescape(t) for t in re.findall(r"<h3>(.*?)</h3>", page)]
    assert [t.split(",")[0].split(":")[0] for t in titles] == ["Worst", "Median", "Best"]
    views = re.findall(r'<svg class="view".*?</svg>', page, re.S)
    assert len(views) == 9
    best = views[-3]
    assert 'class="outline strong reference" stroke="#56b4e9"' in best
    assert 'class="outline strong prediction" stroke="#ff8c1a"' in best
    missed = views[0]
    assert "strong reference" in missed and "strong prediction" not in missed
    assert all("aria-label=" in v for v in views)
    more = page_of(root / "runs" / "plain", "--num-worst", 3)
    assert len(re.findall(r'<svg class="view"', more)) == 15


def test_the_checkpoint_shown_can_be_chosen(root):
    run = root / "runs" / "plain"
    for fold in FOLDS:
        shutil.rmtree(run / fold / "validation_best")
    made.make_validation(root, run / "fold_0" / "validation_best", {"case_a": 5.0}, shift=0)
    page = page_of(run, "--checkpoint", "best")
    assert [row[0] for row in tables(page)["All cases, worst first"][1:]] == ["case_a"]
    assert "fold_1 was not validated with the best checkpoint" in page
    assert "Over the cases, final checkpoint" in page  # the other one is summed up too


def test_several_runs_are_compared_over_the_cases_of_both(root, tmp_path):
    plain, better = root / "runs" / "plain", root / "runs" / "better"
    out = tmp_path / "pages" / "both.html"
    run_report("--run", plain, better, "--output", out)
    page = out.read_text()
    found = tables(page)
    a, b = made.dices(plain, "fold_0"), made.dices(better, "fold_0")
    rows = {r[0]: r for r in found["better minus plain, 3 paired cases"]}
    gain = made.mean(b.values()) - made.mean(a.values())
    assert rows["Dice"][3] == f"{gain:.3f}"
    assert [int(rows["Dice"][7]), int(rows["Dice"][8])] == [
        sum(b[c] > a[c] for c in a),
        sum(b[c] < a[c] for c in a),
    ]
    caption = next(c for c in found if c.startswith("Dice by case"))
    by_case = {r[0]: r[2:] for r in found[caption][1:]}
    assert by_case == {
        c: [f"{a[c]:.3f}", f"{b[c]:.3f}", f"{b[c] - a[c]:.3f}".replace("-", "−")] for c in a
    }
    assert ["optim.lr", "0.01 -> 0.02"] in found["plain → better"]
    assert "3 of 6 cases were validated in all runs" in page
    gains = sorted(a, key=lambda c: a[c] - b[c])[: comparison.NUM_CHANGED]
    titles = [t for t in re.findall(r"<h3>(.*?)</h3>", page)]
    assert [t.split(",")[0] for t in titles] == [f"Gain: {c}" for c in gains]
    assert page.count('<svg class="view"') == 3 * len(gains)
    assert "#ffff66" in page  # a second prediction has a third colour


def test_cases_with_another_reference_are_not_compared(root, tmp_path):
    path = root / "runs" / "better" / "fold_0" / "validation_final" / "panther.json"
    scores = json.loads(path.read_text())
    next(c for c in scores["per_subject"] if c["subject"] == "case_a")["gt_volume"] *= 1.5
    path.write_text(json.dumps(scores))
    out = tmp_path / "both.html"
    run_report("--run", root / "runs" / "plain", root / "runs" / "better", "--output", out)
    page = out.read_text()
    assert "1 case(s) have another reference in another run and are not compared: case_a" in page
    assert "2 paired cases" in page


def test_folds_named_one_by_one_are_one_cross_validation(root):
    run = root / "runs" / "plain"
    run_report("--run", run / "fold_1", run / "fold_0")
    together = (run / "report.html").read_text()
    assert "cross-validation over 2 folds" in together
    run_report("--run", run / "fold_1")
    alone = (run / "fold_1" / "report.html").read_text()
    listed = {row[0] for row in tables(alone)["All cases, worst first"][1:]}
    assert listed == set(FOLDS["fold_1"])


def test_runs_of_the_same_name_are_told_apart(root, tmp_path):
    other = shutil.copytree(root / "runs" / "plain", tmp_path / "second" / "plain")
    names = [r.name for r in records.read_runs([root / "runs" / "plain", other])]
    assert names == ["runs/plain", "second/plain"]


# ------------------------------------------------------------------------- missing and damaged


def test_an_unfinished_run_shows_what_there_is(root):
    run = made.make_run(root, "young", {"fold_0": {}}, epochs=2, finished=False)
    page = page_of(run)
    assert "fold_0 is not finished: 2 of 5 epochs" in page
    assert sections_of(page) == ["notices", "curves", "settings"]
    assert page.count('<svg class="chart"') == 5
    (run / "fold_0" / "validation_final").mkdir()
    (run / "fold_0" / "validation_final" / "case_a.mha").touch()
    assert "is not complete: 1 label maps, but no summary.json" in page_of(run)


def test_broken_lines_and_files_are_named_and_the_rest_is_shown(root):
    run = root / "runs" / "plain"
    metrics = run / "fold_0" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    lines[1:1] = ["[1, 2]", '{"epoch": "x"}']
    metrics.write_text("\n".join(lines) + '\n{"epoch": 7, "train_')
    (run / "config.json").write_text("{broken")
    (run / "fold_1" / "run.json").unlink()
    page = page_of(run)
    assert "metrics.jsonl: line(s) 2, 3, 8 are not an epoch&#39;s JSON" in page
    assert "config.json is not valid JSON" in page and "run.json is missing" in page
    assert len(records.read_runs([run])[0].folds[0].rows) == 5
    assert "Over the cases, final checkpoint" in tables(page)


def test_without_panther_json_the_summary_tells_the_dice(root):
    run = root / "runs" / "better"
    dice = made.dices(run, "fold_0")
    (run / "fold_0" / "validation_final" / "panther.json").unlink()
    page = page_of(run)
    row = tables(page)["Over the cases, final checkpoint"][1]
    assert row[:3] == ["Dice tumor", "3", f"{made.mean(dice.values()):.3f}"]
    assert "panther.json is missing" in page


def test_scores_that_are_no_numbers_come_on_top_and_are_not_averaged(root):
    run = root / "runs" / "better"
    path = run / "fold_0" / "validation_final" / "panther.json"
    scores = json.loads(path.read_text())
    scores["per_subject"][0]["volumetric_dice"] = float("nan")
    scores["per_subject"][0]["hausdorff95"] = float("inf")
    scores["per_subject"][1]["masd"] = None
    path.write_text(json.dumps(scores))
    found = tables(page_of(run))
    assert found["Failures"][1][:2] == ["case_a", "a score is not a number"]
    assert found["All cases, worst first"][1][:2] == ["case_a", "–"]
    overall = {row[0]: row for row in found["Over the cases, final checkpoint"]}
    assert [overall[m][1] for m in ("Dice tumor", "HD95 mm", "MASD mm")] == ["2 of 3"] * 3


def test_validation_cases_without_a_result_are_failures(root):
    store = root / "store" / made.DATASET / made.PLANS
    splits = [
        {"train": [], "val": ["case_a", "case_b", "case_c", "case_z"]},
        {"train": [], "val": list(FOLDS["fold_1"])},
    ]
    (store / "splits_final.json").write_text(json.dumps(splits))
    found = tables(page_of(root / "runs" / "plain"))
    assert found["Failures"][1][0] == "case_z" and "no result" in found["Failures"][1][2]
    assert found["All cases, worst first"][1][0] == "case_z"


def test_cases_validated_twice_are_named(root):
    run = root / "runs" / "plain"
    shutil.copytree(run / "fold_0", run / "fold_2")
    assert "3 case(s) were validated in several folds" in html.unescape(page_of(run))


def test_images_are_found_in_the_raw_data_then_in_the_store_else_the_page_says_so(
    root, tmp_path, monkeypatch
):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    run = root / "runs" / "better"
    views = page_of(run).count('<svg class="view"')
    assert views == 9
    moved = tmp_path / "moved"
    shutil.move(root / "raw" / made.DATASET, moved)
    gone = page_of(run)
    assert gone.count('<svg class="view"') == 0
    assert "the image is no longer there" in gone and "Over the cases" in gone
    assert page_of(run, "--raw", moved).count('<svg class="view"') == views
    store = root / "store" / made.DATASET / made.PLANS
    box = [[1, 9], [0, 24], [4, 28]]
    for case in FOLDS["fold_0"]:
        image = np.arange(4 * 24 * 6, dtype=np.float32).reshape(1, 4, 24, 6)
        np.save(store / f"{case}.image.npy", image)
        properties = {
            "geometry": made.geometry().to_json(),
            "shape_before_crop": list(made.SHAPE),
            "crop_box": box,
            "shape_before_resampling": [8, 24, 24],
        }
        (store / f"{case}.json").write_text(json.dumps({"properties": properties}))
    assert page_of(run).count('<svg class="view"') == views
    record = records.read_runs([run])[0]
    back = overlays._stored_image(store, "case_a", record)
    assert back.shape == made.SHAPE
    assert back[0].max() == back[:, :, :4].max() == 0  # outside the crop
    assert np.array_equal(back[1:9:2, :, 4::4], image[0]) and back[2, 3, 7] == image[0, 0, 3, 0]


def test_a_reference_path_relative_to_where_training_ran_is_found(root, monkeypatch, tmp_path):
    run = root / "runs" / "better"
    path = run / "fold_0" / "validation_final" / "summary.json"
    summary = json.loads(path.read_text())
    for entry in summary["metric_per_case"]:
        file = entry["reference_file"]
        entry["reference_file"] = "data/store/" + file.split("/store/")[1]
    path.write_text(json.dumps(summary))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    page = page_of(run)
    assert page.count("outline strong reference") >= 9 and "does not exist" not in page


def test_label_maps_on_another_grid_leave_the_others(root):
    from panther_jax.images import imageio

    run = root / "runs" / "better"
    small = made.label_map(4.0, shape=(4, 4, 4))
    path = run / "fold_0" / "validation_final" / "case_a.mha"
    imageio.write_label(path, small, made.geometry((4, 4, 4)))
    (run / "fold_0" / "validation_final" / "case_b.mha").write_bytes(b"broken")
    page = page_of(run)
    assert page.count('<svg class="view"') == 9
    assert "prediction of better is on another grid" in page
    assert re.search("prediction of better: .*case_b.mha: cannot be read", page)


# -------------------------------------------------------------------------------------- safety


def test_text_from_files_is_escaped(root):
    evil = "<script>alert(1)</script>\"'&\ud800"
    run = root / "runs" / "better"
    plans = json.loads((run / "plans.json").read_text())
    (run / "plans.json").write_text(json.dumps(plans | {"dataset_name": evil, evil: evil}))
    info = json.loads((run / "fold_0" / "run.json").read_text())
    (run / "fold_0" / "run.json").write_text(json.dumps(info | {"device": evil}))
    dataset = made.dataset_json(3) | {"labels": {"background": 0, evil: 1, "pancreas": 2}}
    (run / "dataset.json").write_text(json.dumps(dataset))
    path = run / "fold_0" / "validation_final" / "summary.json"
    path.write_text(path.read_text().replace("case_a", "<img src=x>"))
    rows = run / "fold_0" / "metrics.jsonl"
    row = made.epoch_row(9) | {"pseudo_dice": {evil: 0.5}}
    rows.write_text(rows.read_text() + json.dumps(row) + "\n")
    page = page_of(run)
    assert "<script" not in page and "<img" not in page
    assert page.count("&lt;script&gt;alert(1)") > 5 and "&lt;img src=x&gt;" in page


def test_the_page_names_no_address(root):
    page = page_of(root / "runs" / "plain")
    assert not re.search(
        r"https?:|//[a-z]|url\(|@import|srcset", re.sub(r"base64,[^\"]*", "", page)
    )
    assert "default-src 'none'" in page
    targets = set(re.findall(r'(?:src|href)="(.{5})', page))
    assert targets <= {"data:"} | {t for t in targets if t.startswith("#")}


def test_a_hundred_cases_stay_below_15_megabytes(tmp_path):
    root, shape = tmp_path / "data", (12, 64, 64)
    cases = {f"case_{i:03d}": 4.0 + i % 5 for i in range(100)}
    made.make_data(root, {c: r for c, r in list(cases.items())[:1]}, shape)
    store = root / "store" / made.DATASET / made.PLANS / "references"
    raw = root / "raw" / made.DATASET
    for case in list(cases)[1:]:
        shutil.copy(raw / "imagesTr" / "case_000_0000.mha", raw / "imagesTr" / f"{case}_0000.mha")
        shutil.copy(store / "case_000.mha", raw / "labelsTr" / f"{case}.mha")
        shutil.copy(store / "case_000.mha", store / f"{case}.mha")
    folds = {f"fold_{k}": {c: cases[c] for c in list(cases)[k::5]} for k in range(5)}
    run = made.make_run(root, "big", folds, epochs=300, checkpoints=("final",))
    page = page_of(run)
    assert len(tables(page)["All cases, worst first"]) == 101
    assert page.count('class="dot"') == 200
    assert page.count('<svg class="view"') == 15
    # 15 views of images of 512x512 are at most 5.3 MB more, tests/test_charts.py
    assert len(page.encode()) < 2e6


# --------------------------------------------------------------------------------- command line


def test_own_pages_are_written_anew_and_other_files_are_not(root, tmp_path, caplog):
    run = root / "runs" / "better"
    first = page_of(run)
    assert sections_of(page_of(run)) == sections_of(first)
    foreign = tmp_path / "notes.html"
    foreign.write_text("mine")
    run_report("--run", run, "--output", foreign, code=2)
    assert foreign.read_text() == "mine"
    run_report("--run", run, "--output", foreign, "--overwrite")
    assert "panther_jax.report" in foreign.read_text()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere"], "nowhere is not a folder"),
        (["--run", "empty"], "is not a run: expected fold_K folders in it, found config.json"),
        (["--run", "data/runs/plain", "data/runs/better"], "name the page, --output"),
        (["--run", "data/runs/plain", "--num-worst", "0"], "--num-worst must be at least 1"),
        (["--run", "data/runs/plain", "--raw", "nowhere"], "--raw nowhere is not a folder"),
        (["--run", "data/runs/plain", "--output", "empty"], "is a folder; name a file"),
    ],
)
def test_wrong_usage_is_one_clear_message(root, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(root.parent)
    (root.parent / "empty").mkdir()
    (root.parent / "empty" / "config.json").write_text("{}")
    assert report.main(arguments) == 2
    told = capsys.readouterr()
    assert message in told.err and "Traceback" not in told.err and told.out == ""


def test_the_result_is_the_path_and_help_is_quick(root, capsys):
    run = root / "runs" / "better"
    run_report("--run", run)
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    import subprocess

    code = "import sys; from panther_jax import report; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


# -------------------------------------------------------------------------------------- browser

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH")


def colours(path):
    from PIL import Image

    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)

    def near(colour):
        return int((np.abs(pixels - colour).max(axis=-1) < 40).sum())

    return near(BLUE), near(ORANGE)


@needs_browser
def test_a_browser_shows_all_of_it_without_network_or_complaint(root, tmp_path):
    run = root / "runs" / "plain"
    page_of(run, "--num-worst", 1)
    page = run / "report.html"
    with browser(tmp_path / "profile") as shown:
        shown("Emulation.setScriptExecutionDisabled", value=True)
        shown.size(1280, 900)
        shown.open(page)
        assert shown.value("document.querySelectorAll('svg.view image').length") == 9
        assert shown.value("document.querySelectorAll('svg.chart').length") == 7
        drawn = "[...document.querySelectorAll('svg.view')].every(e => e.getBBox().width > 20)"
        assert shown.value(drawn)
        decode = """Promise.all([...document.querySelectorAll('svg.view image')].map(e => {
            const i = new Image(); i.src = e.getAttribute('href');
            return i.decode().then(() => i.naturalWidth) }))"""
        assert all(width > 5 for width in shown.value(decode))
        wide = "document.documentElement.scrollWidth > window.innerWidth"
        for width in (1280, 360):
            shown.size(width, 900)
            assert not shown.value(wide), width
        shown.screenshot(tmp_path / "page.png")
        assert min(colours(tmp_path / "page.png")) > 200
        background = "getComputedStyle(document.body).backgroundColor"
        shown.media(prefers_color_scheme="light")
        light = shown.value(background)
        shown.media(prefers_color_scheme="dark")
        assert (light, shown.value(background)) == ("rgb(255, 255, 255)", "rgb(20, 23, 26)")
        outside = [u for u in shown.requests() if not u.startswith("data:")]
        assert outside == [page.as_uri()]
        assert shown.complaints() == []
        unnamed = """[...document.querySelectorAll('svg:not([aria-hidden])')]
            .filter(e => !e.getAttribute('aria-label')).length"""
        assert shown.value(unnamed) == 0
        headless = "[...document.querySelectorAll('th')].filter(e => !e.scope).length"
        assert shown.value(headless) == 0


@needs_browser
def test_a_browser_shows_a_comparison(root, tmp_path):
    out = tmp_path / "both.html"
    run_report("--run", root / "runs" / "plain", root / "runs" / "better", "--output", out)
    with browser(tmp_path / "profile") as shown:
        shown.size(1280, 900)
        shown.open(out)
        count = out.read_text().count('<svg class="view"')
        assert shown.value("document.querySelectorAll('svg.view image').length") == count > 0
        assert shown.complaints() == []
        assert [u for u in shown.requests() if not u.startswith("data:")] == [out.as_uri()]


def test_the_fold_of_all_cases_is_shown_only_alone_and_said_to_have_seen_its_cases(root):
    run = root / "runs" / "plain"
    shutil.copytree(run / "fold_0", run / "fold_all")
    both = records.read_runs([run])[0]
    assert [f.name for f in both.folds] == ["fold_0", "fold_1"]
    assert "cases that were trained on" not in page_of(run)
    run_report("--run", run / "fold_all")
    page = (run / "fold_all" / "report.html").read_text(encoding="utf-8")
    assert "cases that were trained on" in page and "trained on: its scores say nothing" in page
