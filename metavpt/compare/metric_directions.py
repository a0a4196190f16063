"""Which way is good for a metric, by the words of its name."""

import re

ERRORS = r"rmse|mse|mae|rel|log10|silog|loss|nll|ce|kl|error|perplexity|ppl|fid"
SCORES = r"delta_?\d|miou|iou|dice|acc|accuracy|top\d|map|ndcg|mrr|recall|precision|f1|auc|auroc|pass|r2|psnr|ssim|reward|rankme"
LOWER_IS_BETTER = re.compile(rf"(?:^|[_@])(?:{ERRORS})(?=[_@]|$)", re.IGNORECASE)
HIGHER_IS_BETTER = re.compile(rf"(?:^|[_@])(?:{SCORES})(?=[_@]|$)", re.IGNORECASE)


def sign(name: str) -> int:
    """-1 where lower is better, +1 where higher is better, 0 where the name does not say.

    Only what follows the last `/` counts: `retrieval/map_medium` is a `map`. An error or loss of a score is an error.
    """
    metric = name.rsplit("/", 1)[-1]
    if LOWER_IS_BETTER.search(metric):
        return -1
    return 1 if HIGHER_IS_BETTER.search(metric) else 0
