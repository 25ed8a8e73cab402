"""The labels of every score."""

import torch

from tests.small_model import WIDTH, config_of
from tmass_dist.models.head import build_head
from tmass_dist.score_labels import label_words, score_tags, scoring_labels


def test_protocol_samples_precision_and_a_transductive_step_are_named() -> None:
    settings = ["evaluation.post_processing=dsl", "evaluation.precision=bfloat16"]
    labels = scoring_labels(config_of(*settings, "stochastic.num_trials=7"), None)
    assert label_words({**labels, "selected_on": "val", "feature_precision": "float16"}) == [
        "protocol query_conditioned",
        "M = 7",
        "checkpoint selected on val",
        "post-processing dsl (transductive)",
        "precision bfloat16",
        "feature precision float16",
        "noise keyed by seed 0, caption text and trial",
    ]


def test_a_learnt_tau_is_named_and_samples_only_where_they_are_drawn() -> None:
    config = config_of("model.radius=none", "model.pooling=query_scored")
    head = build_head(config.model, WIDTH)
    with torch.no_grad():
        next(head.pooling.parameters()).fill_(0.5)
    assert head.tau is not None and abs(head.tau - 0.1 * 2.71828**0.5) < 1e-4
    words = label_words(scoring_labels(config, head.tau))
    assert words == [
        "protocol query_conditioned",
        f"learnt tau {head.tau:.5f}",
        "post-processing none",
        "precision float32",
    ]
    assert build_head(config_of("model.radius=none", "model.pooling=best_frame").model, WIDTH).tau is None


def test_the_tags_of_a_result_state_its_labels() -> None:
    """The learnt tau is a value: it changes during training, and a tag does not."""
    settings = ["evaluation.post_processing=dsl", "evaluation.precision=bfloat16", "stochastic.num_trials=7"]
    labels = scoring_labels(config_of(*settings), None) | {"selected_on": "val", "feature_precision": "float16"}
    assert score_tags("test", labels, t2v={"R@1": 40.0}, v2t={"MdR": 2.0}) == {
        "metrics/test/selected_on_val/query_conditioned/M7/dsl/bfloat16/features_float16/t2v_R@1": 40.0,
        "metrics/test/selected_on_val/query_conditioned/M7/dsl/bfloat16/features_float16/v2t_MdR": 2.0,
    }
    query_scored = config_of("model.radius=none", "model.pooling=query_scored")
    assert score_tags("val", scoring_labels(query_scored, 0.125), t2v={"R@1": 40.0}) == {
        "metrics/val/query_conditioned/t2v_R@1": 40.0,
        "metrics/val/query_conditioned/learnt_tau": 0.125,
    }


def test_results_of_older_versions_lack_labels() -> None:
    assert label_words({"protocol": "query_conditioned"}) == ["protocol query_conditioned"]
