import json
import xml.etree.ElementTree as ET

import pytest
import typer
from worlds import chat, suite_of

from policies.lineup import REFERENCES, resolve
from training.commands import pages
from training.judging.evaluate import evaluate
from training.pages import pictures
from training.pages.pictures import burst, learning, read_curves, save
from training.replaying.scenarios import load_suite


def words(path):
    """The texts of an SVG file."""
    return {text for text in ET.parse(path).getroot().itertext() if text.strip()}


def curve(*scores):
    return [
        {"steps": 1000.0 * at, "score": score, "attainment": 0.9, "holds_slo_share": 0.5, "churn": 0.0}
        for at, score in enumerate(scores)
    ]


def run_of(folder, *curves):
    for seed, points in enumerate(curves):
        (folder / f"seed-{seed}").mkdir()
        (folder / f"seed-{seed}" / "state.json").write_text(json.dumps({"steps": 1, "curve": points}))
    return folder


def test_a_burst_shows_every_policy_and_panel(tmp_path):
    found = evaluate(suite_of(chat()), ["reactive", "static"])
    figure = burst({name: line for (_, name), line in found.timelines.items()}, "a day", 0.9)
    replicas = figure.axes[1]
    line = found.timelines["chat", "static"]
    assert replicas.lines[1].get_ydata().tolist() == line.ready.sum(axis=1).tolist()
    save(figure, tmp_path / "burst.svg")
    expected = {
        "a day",
        "reactive",
        "static",
        "requests/s",
        "ready replicas",
        "batch cap",
        "waiting requests",
        "minutes",
    }
    assert expected <= words(tmp_path / "burst.svg")


def test_the_same_figures_give_the_same_file(tmp_path):
    for name in ("a", "b"):
        save(learning([curve(3.0, 2.0), curve(5.0, 4.0)], "two seeds"), tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "two seeds" in words(tmp_path / "a.svg")


def test_learning_curves_are_the_mean_over_seeds_as_far_as_all_went(tmp_path):
    curves = read_curves(run_of(tmp_path, curve(3.0, 2.0, 1.0), curve(5.0, 4.0)))
    score = learning(curves, "two seeds").axes[0]
    (mean,) = score.lines
    assert mean.get_xdata()[-1] == pytest.approx(1000 / 1e6)
    assert (mean.get_ydata()[0], mean.get_ydata()[-1]) == pytest.approx((4.0, 3.0))
    (band,) = score.collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == pytest.approx((2.0, 5.0))


@pytest.mark.parametrize("picture", pictures.PICTURES.values(), ids=pictures.PICTURES)
def test_what_is_shown_is_there(picture):
    (scenario,) = load_suite(picture.suite).only([picture.scenario]).scenarios
    assert scenario.description
    assert all(resolve(name).reference == name for name in picture.policies if name not in REFERENCES)


def test_a_folder_without_a_run_is_refused_before_anything_is_replayed(tmp_path, capsys):
    with pytest.raises(typer.Exit):
        pages.pictures(run=tmp_path, out=tmp_path)
    assert capsys.readouterr().err == f"error: {tmp_path}: no validation of any seed here: expected seed-*/state.json\n"
    (run_of(tmp_path, curve(1.0)) / "seed-0" / "state.json").write_text('{"curve": [{"steps": 1}]}')
    with pytest.raises(ValueError, match=r"state.json: not the state of a training run"):
        read_curves(tmp_path)
