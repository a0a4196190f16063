import json

from metavpt.probes.samples import Answer, Candidate, Texts, Token


def test_parse_inverts_json() -> None:
    texts = Texts(
        [[Token("a", 0.5, [Candidate("b", 0.25)], 1.5), Token("c")]],
        [Answer("1 + 1", "2", "3", False)],
    )
    assert Texts.parse(json.loads(json.dumps(texts._asdict()))) == texts


def test_parse_reads_tokens_without_a_weight() -> None:
    state = {"passages": [[["a", 0.5, []]]], "answers": []}
    assert Texts.parse(state) == Texts([[Token("a", 0.5, [])]], [])
