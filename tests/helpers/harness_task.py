"""A task of lm-evaluation-harness on a local file."""

TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["3", "7"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
