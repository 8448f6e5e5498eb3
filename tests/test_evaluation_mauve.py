import sys

import numpy as np
import pytest
from evaluation_toys import numpy_state

from cdlm.core.errors import CdlmError
from cdlm.evaluation.metrics.mauve import FEWEST_TEXTS, library, mauve, settings


@pytest.fixture(autouse=True, scope="module")
def installed():
    pytest.importorskip("mauve", reason="mauve-text is optional")


def cloud(texts: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(texts, 8)) + shift).astype(np.float32)


def test_identical_features_score_one_and_far_features_near_zero():
    p = cloud(200, 0)
    assert mauve(p, p) == pytest.approx(1, abs=1e-6)
    assert mauve(p, -cloud(200, 0, shift=20)) < 0.02


def test_closer_is_higher():
    p = cloud(400, 0)
    same, near, far = (mauve(p, cloud(400, 2, shift)) for shift in (0.0, 0.7, 2.0))
    assert same > 0.9
    assert same > near > far


def test_the_seed_decides_the_value():
    p, q = cloud(60, 0), cloud(60, 1, 0.5)
    assert mauve(p, q, seed=3) == mauve(p, q, seed=3)
    assert len({mauve(p, q, seed) for seed in range(1, 6)}) > 1


def test_the_settings_say_how_it_was_made():
    found = settings(130)
    assert str(found["library"]).startswith("mauve-text ")
    assert found["mauve_scaling_factor"] == 5
    p, q = cloud(130, 0), cloud(130, 1)
    assert library().compute_mauve(p_features=p, q_features=q, seed=1).num_buckets == found["clusters"] == 13


def test_faiss_is_quiet_and_other_messages_pass(capfd):
    mauve(cloud(60, 0), cloud(60, 1))
    assert capfd.readouterr().err == ""
    library().compute_mauve(p_features=cloud(60, 0), q_features=cloud(60, 1), seed=1)
    assert "please provide at least" in capfd.readouterr().err  # the remark that is expected, and dropped above


def test_global_numpy_state_stays_untouched():
    before = numpy_state()
    mauve(cloud(60, 0), cloud(60, 1))
    assert before == numpy_state()


def test_a_collapsed_generator_scores_near_zero_and_raises_no_warning():
    collapsed = np.ones((60, 8), dtype=np.float32)
    assert mauve(collapsed, -cloud(60, 1, shift=20)) < 0.05
    assert mauve(np.zeros((60, 8), dtype=np.float32), cloud(60, 1)) < 0.2


def test_unequal_or_few_texts_are_refused():
    with pytest.raises(CdlmError, match="equally many texts"):
        mauve(cloud(60, 0), cloud(61, 1))
    few = FEWEST_TEXTS - 1
    with pytest.raises(CdlmError, match=f"at least {FEWEST_TEXTS} texts a side for MAUVE, got {few}"):
        mauve(cloud(few, 0), cloud(few, 1))


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(CdlmError, match=r"pip install 'cdlm\[mauve\]'"):
        mauve(cloud(60, 0), cloud(60, 1))
