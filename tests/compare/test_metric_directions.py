import pytest

from metavpt.compare.metric_directions import sign

LOWER = """
depth/rmse depth/abs_rel depth/sq_rel depth/rmse_log depth/log10 ridge/depth_rmse nll gsm8k/nll perplexity wikitext/ppl useful_mse mse mae
error knn/error_rate LOSS loss feedback_loss retrieval/map_error recall_loss
"""
HIGHER = """
depth/delta1 depth/delta_2 ridge/seg_miou segmentation/miou segmentation/mIoU pass@1 pass_at_1 gsm8k/pass@8 knn/accuracy knn/acc@5 knn/top1
accuracy_strict retrieval/map_medium retrieval/map recall@10 recall
"""
UNKNOWN = "value step odd depth/mean relevance erroneous accumulated mapped bypass_1 loss/odd pressure maple rmses"


@pytest.mark.parametrize("name", LOWER.split())
def test_lower_is_better(name):
    assert sign(name) == -1


@pytest.mark.parametrize("name", HIGHER.split())
def test_higher_is_better(name):
    assert sign(name) == 1


@pytest.mark.parametrize("name", UNKNOWN.split())
def test_a_word_that_only_holds_a_known_one_says_nothing(name):
    assert sign(name) == 0
