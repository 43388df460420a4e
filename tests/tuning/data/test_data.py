"""Reading demonstrations, refusing bad ones by file and line, and their tokens."""

import json
import warnings

import pytest
import torch
from tokenizers import normalizers

from ctkernels.testing.tasks import BOS, char_tokenizer, ids, write_jsonl
from ctkernels.tuning.data.demonstrations import DataError, Demonstration, load_jsonl, load_metaicl
from ctkernels.tuning.data.formats import PairEncoder, TextFormat, encode_context, encode_prompt, encode_rows

GOOD = {"input": "snow", "output": "cold", "options": ["cold", "warm"]}
PAIRS = [Demonstration("ab", "c"), Demonstration("d", "ef"), Demonstration("gh", "i")]


def test_a_context_is_the_pairs_with_one_delimiter_between_everything():
    context = encode_context(char_tokenizer(), PAIRS)
    assert tuple(context.input_ids.tolist()) == ids("ab_c_d_ef_gh_i")
    assert context.input_ids.dtype == context.segments.dtype == torch.int64
    # a leading delimiter belongs to its own segment
    assert context.segments.tolist() == [0, 4, 9, 14]


def test_rows_start_with_the_delimiter_and_run_all_but_the_last_answer_token():
    rows = encode_rows(char_tokenizer(), PAIRS)
    assert [row.tokens for row in rows] == [ids("_ab_"), ids("_d_e"), ids("_gh_")]
    assert [row.answers for row in rows] == [(ids("c"),), (ids("ef"),), (ids("i"),)]
    assert [row.first_label for row in rows] == [3, 2, 3]
    assert [row.held_out for row in rows] == [0, 1, 2]


def test_a_prompt_is_what_a_row_begins_with():
    for text_format in (None, TextFormat(delimiter="c")):
        for pair, row in zip(PAIRS, encode_rows(char_tokenizer(), PAIRS, text_format), strict=True):
            prompt = encode_prompt(char_tokenizer(), pair.input, text_format)
            assert prompt == list(row.tokens[: len(prompt)]) and len(prompt) == len(pair.input) + 2


def test_learn_stop_makes_the_next_delimiter_a_label():
    row = encode_rows(char_tokenizer(), PAIRS, learn_stop=True)[1]
    assert (row.tokens, row.answers, row.first_label) == (ids("_d_ef"), (ids("ef_"),), 2)


@pytest.mark.parametrize(
    ("adds_bos", "asked", "expected"), [(True, None, True), (False, None, False), (False, True, True)]
)
def test_bos_comes_first_and_no_segment_holds_it(adds_bos, asked, expected):
    context = encode_context(char_tokenizer(adds_bos=adds_bos), PAIRS, TextFormat(bos=asked))
    start = (BOS,) if expected else ()
    assert tuple(context.input_ids.tolist()) == start + ids("ab_c_d_ef_gh_i")
    assert context.segments.tolist() == [n + len(start) for n in (0, 4, 9, 14)]


def test_an_empty_context_is_bos_or_nothing():
    assert encode_context(char_tokenizer(), []).input_ids.tolist() == []
    context = encode_context(char_tokenizer(adds_bos=True), [])
    assert (context.input_ids.tolist(), context.segments.tolist()) == ([BOS], [1])


def test_a_long_input_loses_its_end_and_this_is_said():
    pair = Demonstration("abcdefghij", "xyz", source="train.jsonl:7")
    with pytest.warns(UserWarning, match=r"1 inputs lost their end .* 8 tokens: train\.jsonl:7"):
        context = encode_context(char_tokenizer(), [pair], TextFormat(max_pair_tokens=8))
    assert tuple(context.input_ids.tolist()) == ids("abcd_xyz")
    with pytest.warns(UserWarning):
        (row,) = encode_rows(char_tokenizer(), [pair], TextFormat(max_pair_tokens=8))
    assert row.tokens == ids("_abcd_xy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # at the limit nothing is cut
        encode_context(char_tokenizer(), [pair], TextFormat(max_pair_tokens=14))


def test_an_output_that_leaves_no_room_is_refused_with_its_place():
    pair = Demonstration("ab", "xyzxyz", source="train.jsonl:3")
    with pytest.raises(DataError, match=r"^train\.jsonl:3: the output alone has 6 tokens; with max_pair_tokens=7"):
        encode_context(char_tokenizer(), [pair], TextFormat(max_pair_tokens=7))
    with pytest.raises(
        DataError, match=r"^train\.jsonl:3: max_pair_tokens=7 leaves no room for an input before 6 tokens"
    ):
        PairEncoder(char_tokenizer(), TextFormat(max_pair_tokens=7)).prompt(pair, 6)


@pytest.mark.parametrize(
    ("tokenizer", "delimiter"),
    [({"drops_spaces": True}, " "), ({}, "  "), ({}, "\n"), ({}, "")],
    ids=["no token", "two tokens", "unknown token", "empty"],
)
def test_the_delimiter_must_be_one_known_token(tokenizer, delimiter):
    with pytest.raises(ValueError, match="delimiter must be exactly one token"):
        encode_context(char_tokenizer(**tokenizer), PAIRS, TextFormat(delimiter=delimiter))


def test_another_delimiter():
    context = encode_context(char_tokenizer(), PAIRS, TextFormat(delimiter="?"))
    assert tuple(context.input_ids.tolist()) == ids("ab?c?d?ef?gh?i")


def test_options_that_occur_twice_count_once():
    assert Demonstration("a", "b", ("c", "b", "c", "b")).options == ("c", "b")


def test_jsonl_is_read_with_sources(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + json.dumps(GOOD).encode()
        + b"\r\n\n"
        + b'{"input": "f\xc3\xbcr", "output": "4", "options": []}'
    )
    first, second = load_jsonl(path)
    assert first == Demonstration("snow", "cold", ("cold", "warm"))
    assert second == Demonstration("für", "4", None)
    assert [d.source for d in (first, second)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "a", "output": ', "not a JSON object: .* at column"),
        ('["a", "b"]', r"expected an object with input and output, got list \[\"a\", \"b\"\]"),
        ('{"input": "a"}', r"the field 'output' is missing; the fields are \['input'\]"),
        ('{"inputs": "a", "output": "b"}', "the field 'input' is missing"),
        ('{"input": "", "output": "b"}', "input must not be blank, got ''"),
        ('{"input": "a", "output": " "}', "output must not be blank, got ' '"),
        ('{"input": 3, "output": "b"}', "input must be a string, got int 3"),
        ('{"input": "a", "output": null}', "output must be a string, got NoneType null"),
        ('{"input": "a", "output": "b", "options": ["c", "d"]}', r"output 'b' is not one of the options \['c', 'd'\]"),
        ('{"input": "a", "output": "b", "options": "b"}', "options must be a list of strings, got str"),
        ('{"input": "a", "output": "b", "options": ["b", 1]}', "options must be strings, got int 1"),
        ('{"input": "a", "output": "b", "options": ["b"]}', "options must name at least two answers"),
        ('{"input": "a", "output": "b", "options": ["b", "b"]}', "options must name at least two answers"),
        ('{"input": "a", "output": "b", "options": ["b", ""]}', "options must not be blank"),
        (r'{"input": "a", "output": "\ud800"}', "output must be Unicode text, got one half of a surrogate pair"),
        (r'{"input": "a", "output": "b", "options": ["b", "\udfff"]}', "options must be Unicode text"),
    ],
)
def test_a_bad_line_is_refused_by_number(tmp_path, line, message):
    path = write_jsonl(tmp_path / "train.jsonl", [GOOD, "", line, "also bad"])
    with pytest.raises(DataError, match=rf"train\.jsonl:3: {message}"):
        load_jsonl(path)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*missing\.jsonl: No such file"):
        load_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="holds no input/output pair"):
        load_jsonl(write_jsonl(tmp_path / "empty.jsonl", ["", " "]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"input": "a", "output": "b"}\n{"input": "f\xfcr", "output": "b"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not UTF-8 at byte 13 of the line"):
        load_jsonl(tmp_path / "latin.jsonl")


def test_metaicl_layout(tmp_path):
    (tmp_path / "sick").mkdir()
    write_jsonl(tmp_path / "sick" / "sick_16_13_train.jsonl", [{"task": "sick", **GOOD}])
    write_jsonl(tmp_path / "sick" / "sick_4_13_train.jsonl", [GOOD, GOOD])
    assert len(load_metaicl(tmp_path, "sick", 13, "train")) == 1
    assert len(load_metaicl(tmp_path, "sick", 13, "train", shots=4)) == 2
    with pytest.raises(DataError, match="has no task 'sik'; tasks there: sick"):
        load_metaicl(tmp_path, "sik", 13, "train")
    with pytest.raises(DataError, match=r"no file sick_16_14_train\.jsonl; files there: sick_16_13_train\.jsonl"):
        load_metaicl(tmp_path, "sick", 14, "train")
    with pytest.raises(DataError, match="split must be one of train, dev, test, got 'validation'"):
        load_metaicl(tmp_path, "sick", 13, "validation")


def test_words_without_tokens_are_refused():
    tokenizer = char_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    for pair, what in ((Demonstration("zz", "a"), "the input 'zz'"), (Demonstration("a", "zz"), "the output 'zz'")):
        with pytest.raises(DataError, match=f"{what} has no tokens"):
            encode_context(tokenizer, [pair])
