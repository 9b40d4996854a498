"""The row format: keys, columns decoded once, columns written back."""

from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict

from recipe.skpo.method.rows import (
    DOWNSTREAM,
    OUTCOME_FIELDS,
    PHASE_FIELD,
    UPSTREAM,
    WEIGHT_FIELD,
    Ragged,
    RolloutRecord,
    RowKey,
    Rows,
    TokenCounts,
    Transcript,
    Visit,
    visit_columns,
)
from tests.support.queue import packed
from tests.support.rows import make_record, make_rows, stored_row


def test_keys_sort_by_visit_and_then_by_session_as_a_number() -> None:
    keys = ["v0000000010_2_0", "v0000000009_10_0", "v0000000009_9_0", "pad_of_verl_0_0"]
    assert sorted(keys, key=RowKey.parse) == [keys[3], keys[2], keys[1], keys[0]]
    assert RowKey.parse("pad_of_verl_12_0") == RowKey("pad_of_verl", 12, 0)


def test_a_visit_becomes_a_uid_and_four_fields() -> None:
    visits = [Visit(7, 12, 99, 40.4, step=3), Visit(8, 1, 5, 2.6, step=3)]
    assert [visit.uid for visit in visits] == ["v0000000007", "v0000000008"]
    assert {name: column.tolist() for name, column in visit_columns(visits).items()} == {
        "skpo_split_position": [12, 1],
        "skpo_seed": [99, 5],
        "skpo_expected_length": [40, 3],
        "skpo_step": [3, 3],
    }


def test_a_record_sums_its_candidates_up() -> None:
    record = make_record(chosen=1)
    assert (record.deviation, record.early_share, record.boundary_share) == (0.75, 0.5, None)


def read(stored: list, fields: tuple[str, ...] = ()) -> Rows:
    names = ["id", "extra_fields", *fields]
    columns = TensorDict({name: packed([row[name] for _, row, _ in stored]) for name in names}, len(stored))
    return Rows.read(columns, [key for key, _, _ in stored], [tag for _, _, tag in stored])


def test_stored_rows_are_decoded() -> None:
    stored = [
        stored_row("v2", 2, -1.0, [5, 6, 7], opening=1, id=17),
        stored_row("v1", 0, 0.5, [9, 9], UPSTREAM),
        stored_row("v2", 0, 0.25, [4], UPSTREAM, id=17),
    ]
    stored[1][2]["is_padding"] = True
    rows = read(stored, (PHASE_FIELD, "old_log_probs"))
    assert rows.phase.tolist() == [DOWNSTREAM, UPSTREAM, UPSTREAM]
    assert rows.prompts.tolist() == [0, 1, 0]
    assert rows.prompt_ids == ["17", "id-v1", "17"]
    assert (rows.lengths.tolist(), rows.tokens["response_mask"].sizes.tolist()) == ([2, 0, 1], [3, 2, 1])
    assert rows.rewards.tolist() == [-1.0, 0.0, 0.25] and rows.rewards.dtype == torch.float32
    assert rows.padding.tolist() == [False, True, False]
    counts, _, record = rows.records
    assert isinstance(record, RolloutRecord)
    made = make_record(generated=1, prefilled=2, cached=1, candidates=())
    assert (counts, replace(record, candidates=())) == (TokenCounts(2, 2, 1), made)
    assert [(item.token_ids.tolist(), item.kept) for item in record.candidates] == [([5, 6], 2), ([7, 8], 1)]
    assert [column.tolist() for column in rows.tokens["old_log_probs"].split()] == [
        pytest.approx([-0.05, -0.06, -0.07]),
        pytest.approx([-0.09, -0.09]),
        pytest.approx([-0.04]),
    ]
    assert (rows.valid_mask.tolist(), rows.segments, rows.siblings(2)) == ([True, False, True], [2], [0])
    assert rows.mean_response_lengths().tolist()[::2] == [3.0, 3.0]


def test_rows_of_a_baseline_are_downstream_and_counted_by_their_tags() -> None:
    stored = [stored_row("v1", session, 1.0, [5] * session, None, prompts=[1, 2, 3]) for session in (1, 2)]
    # A tool's answer, which only the mask shows.
    stored[1][1]["response_mask"] = torch.tensor([1, 0])
    rows = read(stored, OUTCOME_FIELDS)
    assert rows.phase.tolist() == [DOWNSTREAM] * 2
    assert (rows.lengths.tolist(), rows.rewards.tolist()) == ([1, 1], [1.0, 1.0])
    assert [row.tolist() for row in rows.per_token(torch.tensor([0.5, 0.25])).unbind()] == [[0.5], [0.25, 0.0]]
    assert rows.records == [TokenCounts(1, 3, 1), TokenCounts(2, 3, 1)]


@pytest.mark.parametrize("lengths", [[2, 2], [1, 3]])
def test_columns_are_decoded_whatever_their_layout(lengths: list[int]) -> None:
    rows = [torch.arange(length) for length in lengths]
    jagged = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    for column in (jagged, torch.nested.as_nested_tensor(rows), rows):
        ragged = Ragged.of(column)
        assert ragged.sizes.tolist() == lengths and ragged.values.tolist() == torch.cat(rows).tolist()
        assert ragged.sums().tolist() == [int(row.sum()) for row in rows]
        assert [row.tolist() for row in ragged.nested().unbind()] == [row.tolist() for row in rows]


def test_padding_failed_siblings_and_lonely_segments_do_not_count() -> None:
    # Prompt 0: segment, response, failed sibling; prompt 1: all responses lost; then padding, a response among it.
    rows = make_rows(
        upstream=[True, False, False, True, False, True, False],
        prompts=[0, 0, 0, 1, 1, 2, 2],
        lengths=[4, 9, 0, 5, 0, 1, 3],
        padding=[False] * 5 + [True] * 2,
    )
    assert rows.valid_mask.tolist() == [True, True, False, False, False, False, False]
    one = make_rows([True, False], [0, 0], [3, 3], padding=[False, True])
    assert one.valid_mask.tolist() == [False, False], "a padding response does not save a segment"


def test_every_trained_token_gets_what_its_row_has() -> None:
    rows = make_rows([True, False], [0, 0], [2, 1], openings=[0, 2])
    columns = rows.write_back(torch.tensor([0.5, -1.0]), torch.tensor([0.25, 0.125]))
    assert [row.tolist() for row in columns["advantages"].unbind()] == [[0.5, 0.5], [0.0, 0.0, -1.0]]
    assert columns["returns"] is columns["advantages"]
    assert columns[WEIGHT_FIELD].tolist() == [0.25, 0.125]
    assert rows.write_back(torch.tensor([0.5, -1.0])).keys() == {"advantages", "returns"}


def test_a_transcript_is_what_was_read_and_written_downstream() -> None:
    extra = {"reward_extra_info": {"pred": 7}}
    stored = [
        stored_row("v1", 1, 1.0, [55], prompts=[99, 113], extra_fields=extra),
        stored_row("v1", 2, 1.0, [56, 57], prompts=[99, 113], extra_fields={}),
    ]
    columns = TensorDict({name: packed([row[name] for _, row, _ in stored]) for name in Transcript.FIELDS}, 2)
    assert Transcript.read(columns) == Transcript("question of v1", "5", [99, 113], [[55], [56, 57]], ["7", None])
