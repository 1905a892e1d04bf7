import json
from dataclasses import replace

import pytest
import yaml
from judged_rows import ROWS, scenario_of, scored

from policies.learned import load_bundle
from policies.lineup import SHIPPED_BUNDLE
from training.commands.pages import recipe
from training.judging.evaluate import Evaluation
from training.pages.model_card import card, flat


@pytest.fixture(scope="module")
def bundle():
    return load_bundle(SHIPPED_BUNDLE)


def learned(usd, holds=True):
    return replace(scored("learned", usd, holds), scale_events_per_hour=12.0)


def judged(digest, *rows):
    policies = ({"policy": "learned", "bundle_digest": digest}, {"policy": "hpa", "bundle_digest": None})
    return Evaluation("toy", rows, (scenario_of(),), policies, {"jevons": "1"}).to_json()


def test_the_card_says_what_the_bundle_and_the_evaluation_know(bundle):
    text = card(bundle, "a.zip", [judged(bundle.digest, *ROWS, learned(20.0))])
    assert f"| digest | {bundle.digest} |" in text
    assert f"| steps | {bundle.manifest.provenance['steps']} |" in text
    for feature, low, high in zip(
        bundle.manifest.features, bundle.manifest.feature_low, bundle.manifest.feature_high, strict=True
    ):
        assert f"| `{feature}` | {low:.3g} | {high:.3g} |" in text
    for path, _ in flat(bundle.manifest.provenance["config"]):
        assert f"| `{path}` |" in text
    # Of the two peers without hindsight the tuned one is cheaper (18 of 20 dollars), of our own rules there is one.
    assert "| one | 97.00% | 95% | 10.0000 | 2.00 | 12.0 | hpa (train): 0.90 | reactive (self): 0.75 |" in text
    assert "On suite `toy` it holds every SLO." in text
    assert "There a peer is cheaper on: one." in text
    assert f"--seed {bundle.manifest.provenance['seed']} " in text


def test_a_missed_slo_is_a_limit_and_its_cost_says_nothing(bundle):
    text = card(bundle, "a.zip", [judged(bundle.digest, *ROWS, learned(5.0, holds=False))])
    assert "On suite `toy` it misses the SLO of: one." in text
    assert "| one | 50.00% * | 95% | 2.5000 | - | 12.0 | hpa (train): holds | reactive (self): holds |" in text


def test_an_evaluation_of_another_bundle_is_refused(bundle):
    with pytest.raises(ValueError, match="suite 'toy' judged 0000, but"):
        card(bundle, "a.zip", [judged("0000", *ROWS, learned(20.0))])


def test_a_card_without_evaluations_still_says_what_the_policy_is(bundle):
    assert bundle.digest in card(bundle, "a.zip", [])


def test_the_recipe_trains_again(bundle, capsys):
    recipe()
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(bundle.manifest.provenance["config"]))
