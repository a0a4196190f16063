"""The language problem at its smallest, as options."""

SUMS = "{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}"
SMALL = [
    "problem=lm_gsm8k", "learner.vocab_size=270", "learner.tail_layers=1", "learner.hidden_size=16", "learner.intermediate_size=24",
    "learner.num_hidden_layers=2", "learner.num_attention_heads=2", "designer.width=8", "designer.num_layers=1", "designer.num_heads=2",
    f"data.stream.sums.documents.kinds.chain_sum={SUMS}",
    f"+data.stream.stories.documents.kinds.chain_sum={SUMS}", "~data.stream.stories.documents.kinds.gsm_symbolic",
    "data.feedback.math.limit=10", "data.test.answers.limit=4", "data.general.stories.limit=3",
    "data.num_feedback=6", "data.num_held_out=4", "data.num_test=4", "data.num_general=3", "problem.generator.max_new_tokens=4",
    "problem.length=64", "problem.batch_size=2", "problem.meta_batch_size=2", "problem.feedback_batch_size=3",
]  # fmt: skip
TARGETS = ["designer.num_candidates=6"]  # of the designer of targets
