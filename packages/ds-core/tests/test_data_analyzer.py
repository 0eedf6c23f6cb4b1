"""Analysis of a dataset: values, order, files, damage, and several processes."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from torch import nn

from ds_core.data import (
    MetricIndex,
    SampleLoss,
    VocabularyRarity,
    analyze,
    count_tokens,
    sequence_length,
)
from ds_core.errors import DataError
from ds_core.testing import flip_byte, run_ranks, truncate

#: Python 3.12 warns of fork in a process with threads, which is how torch starts its workers.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

SENTENCES = ["to be", "or not to be", "that is the question", "to be", "be", "is it"]


def samples():
    """Real text as byte tokens."""
    return [torch.tensor(list(text.encode())) for text in SENTENCES]


def vowels(sample):
    return sum(chr(value) in "aeiou" for value in sample.tolist())


def halves(sample):
    return len(sample) / 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_sample_is_measured_and_sorted(tmp_path, num_workers):
    found = analyze(
        samples(), {"seqlen": sequence_length, "vowels": vowels}, tmp_path, num_workers=num_workers
    )
    lengths = [len(text) for text in SENTENCES]
    index = found["seqlen"]
    assert index.by_sample.tolist() == lengths
    assert index.ordered_samples.tolist() == sorted(range(6), key=lambda i: (lengths[i], i))
    assert index.values.tolist() == sorted(set(lengths))
    assert index.ends.tolist() == [sum(n <= v for n in lengths) for v in sorted(set(lengths))]
    assert found["vowels"].by_sample.tolist() == [vowels(sample) for sample in samples()]


def test_an_index_answers_by_value_and_by_share(tmp_path):
    index = analyze(samples(), {"halves": halves}, tmp_path)["halves"]
    assert [index.num_up_to_value(v) for v in (0, 1, 2.5, 2.6, 100)] == [0, 1, 4, 4, 6]
    assert [index.num_up_to_share(part, 100) for part in (0, 50, 99, 100, 120)] == [0, 3, 5, 6, 6]


def test_an_index_opens_by_its_folder_or_a_file_in_it(tmp_path):
    analyze(samples(), {"seqlen": sequence_length}, tmp_path)
    for place in (tmp_path / "seqlen", tmp_path / "seqlen" / "index_to_sample"):
        assert len(MetricIndex.open(place)) == 6


def test_an_analysis_is_not_overwritten_unless_asked(tmp_path):
    analyze(samples(), {"seqlen": sequence_length}, tmp_path)
    with pytest.raises(DataError, match=r"seqlen' exists already; pass overwrite=True"):
        analyze(samples(), {"seqlen": vowels}, tmp_path)
    again = analyze(samples(), {"seqlen": vowels}, tmp_path, overwrite=True)
    assert again["seqlen"].by_sample.tolist() == [vowels(sample) for sample in samples()]


def fails_on_question(sample):
    if len(sample) == 20:
        raise ValueError("too long a question")
    return 1


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (fails_on_question, "metric 'm' of sample 2: ValueError: too long a question"),
        (lambda sample: math.inf, "metric 'm' of sample 0 is inf, expected finite"),
        (lambda sample: "many", "metric 'm' of sample 0: ValueError: could not convert"),
    ],
    ids=["raises", "infinite", "no-number"],
)
def test_a_metric_that_fails_names_the_sample_and_leaves_nothing(
    tmp_path, metric, message, num_workers
):
    with pytest.raises(DataError, match=message):
        analyze(samples(), {"m": metric}, tmp_path, num_workers=num_workers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: truncate(path / "index_to_sample.bin", 3), "has 3 bytes, expected 6"),
        (lambda path: (path / "index_ends.bin").unlink(), "index_ends.bin' is missing"),
        (lambda path: truncate(path / "index.json", 9), "index.json' is damaged"),
        (lambda path: (path / "index.json").unlink(), "is no ds-core metric: cannot read index"),
    ],
    ids=["cut", "lost", "garbled", "no-index"],
)
def test_a_damaged_index_is_an_error(tmp_path, damage, message):
    analyze(samples(), {"seqlen": sequence_length}, tmp_path)
    damage(tmp_path / "seqlen")
    with pytest.raises(DataError, match=message):
        MetricIndex.open(tmp_path / "seqlen")


def test_verifying_finds_a_flipped_bit(tmp_path):
    analyze(samples(), {"seqlen": sequence_length}, tmp_path)
    MetricIndex.verify(tmp_path / "seqlen")
    flip_byte(tmp_path / "seqlen" / "sample_to_metric.bin", 8)
    with pytest.raises(DataError, match=r"sample_to_metric\.bin' is damaged"):
        MetricIndex.verify(tmp_path / "seqlen")


def test_rare_words_make_a_sample_rare():
    dataset = [torch.tensor([0, 0, 1]), torch.tensor([0, 0]), torch.tensor([2])]
    counts = count_tokens(dataset, 4)
    assert counts.tolist() == [4, 1, 1, 0]
    rarity = VocabularyRarity(counts)
    expected = [-2 * math.log(4 / 6) - math.log(1 / 6), -2 * math.log(4 / 6), -math.log(1 / 6)]
    assert [rarity(sample) for sample in dataset] == pytest.approx(expected)


def test_a_token_outside_the_vocabulary_is_named():
    with pytest.raises(DataError, match="sample 1 has token id 9, and vocab_size is 4"):
        count_tokens([torch.tensor([1]), torch.tensor([9])], 4)


class Doubler(nn.Module):
    def forward(self, x, y):
        return (2 * x - y).square().mean()


def test_the_loss_of_a_model_is_a_metric(tmp_path):
    dataset = [(torch.tensor([1.0]), torch.tensor([value])) for value in (2.0, 0.0, 3.0)]
    index = analyze(dataset, {"loss": SampleLoss(Doubler())}, tmp_path)["loss"]
    assert index.by_sample.tolist() == [0.0, 4.0, 1.0]
    assert index.ordered_samples.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("sample", "length"),
    [
        (torch.arange(3), 3),
        ([1, 2], 2),
        ((torch.arange(4), torch.arange(9)), 4),
        ({"labels": [1], "input_ids": torch.arange(5)}, 5),
    ],
    ids=["tensor", "list", "tuple", "mapping"],
)
def test_the_length_of_a_sample_is_that_of_its_tokens(sample, length):
    assert sequence_length(sample) == length


def test_a_sample_without_tokens_says_so():
    with pytest.raises(DataError, match="a sample of type Tensor has no token ids"):
        sequence_length(torch.rand(3))


def on_rank(folder, metric):
    from ds_core import comm

    group = comm.Mesh.world().group("dp")
    try:
        found = analyze(samples(), {"m": metric}, folder, group=group)
    except DataError as error:
        return str(error)
    return found["m"].by_sample.tolist()


def test_ranks_share_the_work(tmp_path):
    for found in run_ranks(2, on_rank, str(tmp_path), vowels):
        assert found == [vowels(sample) for sample in samples()]


def test_a_failure_on_one_rank_is_an_error_on_all(tmp_path):
    found = run_ranks(2, on_rank, str(tmp_path), fails_on_question)
    assert set(found) == {"metric 'm' of sample 2: ValueError: too long a question"}


def write_deepspeed_index(prefix, rows, code, dtype):
    """The bytes of DeepSpeed's `.bin`/`.idx` pair, written by hand."""
    arrays = [np.array(row, dtype) for row in rows]
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(a.tobytes() for a in arrays))
    sizes = np.array([len(a) for a in arrays], np.int32)
    pointers = np.cumsum([0, *[a.nbytes for a in arrays[:-1]]]).astype(np.int64)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(rows), 0)
    prefix.with_name(prefix.name + ".idx").write_bytes(head + sizes.tobytes() + pointers.tobytes())


def test_indices_of_deepspeed_s_analyzer_are_read(tmp_path):
    write_deepspeed_index(tmp_path / "seqlen_index_to_sample", [[4], [0, 3], [1]], 4, np.int32)
    write_deepspeed_index(tmp_path / "seqlen_index_to_metric", [[2], [5], [12]], 6, np.uint16)
    index = MetricIndex.open(
        tmp_path / "seqlen_index_to_sample", tmp_path / "seqlen_index_to_metric"
    )
    assert index.ordered_samples.tolist() == [4, 0, 3, 1]
    assert [index.num_up_to_value(value) for value in (1, 2, 5, 11, 12)] == [0, 1, 3, 3, 4]
