"""`mxdist settings`: every key, what it may be, and what it means."""

import re

import pytest

from mxdist.config.explain import known_keys
from mxdist.config.listing import listing
from mxdist.config.schema import Config
from mxdist.errors import UserError


@pytest.mark.parametrize("width", [60, 100])
def test_every_setting_is_listed_once_or_for_each_variant_of_its_section(width: int) -> None:
    lines = listing("", width)
    assert max(map(len, lines)) <= width
    listed = [match[1] for line in lines if (match := re.match(r"  (\S+)( = | has to be given)", line))]
    sections = {name for name in Config.model_fields if any(key.startswith(f"{name}.") for key in known_keys())}
    assert set(listed) == set(known_keys()) - sections
    assert listed.count("rollout.max_lag") == 1
    assert listed.count("data.eval_problems") == 2


def test_a_setting_shows_its_default_its_bounds_and_its_meaning() -> None:
    assert listing("rollout.max_lag", 200)[1:] == [
        "  rollout.max_lag = 0",
        "      [whole number >= 0] Learner updates a sampled answer may be behind; 0 is synchronous.",
    ]
    assert "      [number > 0 or null] Largest" in "\n".join(listing("guards.max_mismatch", 80))
    assert "  data.train has to be given" in listing("data.train", 80)


def test_a_prefix_that_no_key_has_is_refused_with_one_that_is_close() -> None:
    with pytest.raises(UserError, match=r"^there is no setting rollout\.max_lagg; did you mean rollout\.max_lag\?$"):
        listing("rollout.max_lagg", 80)
